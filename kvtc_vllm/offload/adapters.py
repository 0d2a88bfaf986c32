"""LoRA adapters by what computes, not by the files that a path names now.

An adapter's files may be replaced at any time, while workers compute with what they read before;
even vLLM's copy in host memory may be a map of the file. What computes is the copy in a slot of
the model's LoRA layers. A worker digests that copy whenever an adapter gets a slot, and tells the
scheduler, which names chunks by the digests of all ranks (`AdapterDigests`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import xxhash

from kvtc_vllm.offload.messages import NO_ADAPTER, AdapterUse
from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.offload.word_sample import NEVER, Sample, WordSampler

logger = logging.getLogger("vllm.kvtc")

GONE = b""
"""In the place of a digest: the adapter is in no slot."""
_STACKED = ("lora_a_stacked", "lora_b_stacked")
"""Ends of the names under which vLLM's LoRA layers keep tensors [slots, ...]."""


def adapter_id(request: Request) -> int | None:
    """vLLM's number of a request's adapter; None without one."""
    lora = getattr(request, "lora_request", None)
    return None if lora is None else int(lora.lora_int_id)


class _Slot:
    """An adapter in a slot. digest: None if there is nothing that could be digested."""

    def __init__(self, index: int, adapter: Any, tensors: Sequence[torch.Tensor]) -> None:
        self.index = index
        self._adapter = weakref.ref(adapter)
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
        self._sampler = WordSampler(parts)
        self._sampler.refer()
        self.digest = _digest(parts) if parts else None

    def holds(self, index: int, adapter: Any) -> bool:
        """Whether it is this adapter's, as far as objects tell."""
        return self.index == index and self._adapter() is adapter

    def sample(self) -> Sample:
        return self._sampler.sample()


class LoadedAdapters:
    """Worker side. Used by the engine's thread only. manager: vLLM's, None without LoRA."""

    def __init__(self, manager: Any | None) -> None:
        self._manager = manager
        self._slots: dict[int, _Slot] = {}

    def refresh(self) -> dict[int, bytes | None]:
        """Digests that changed since the last call; GONE, or None where there can't be one."""
        if self._manager is None:
            return {}
        inner = self._manager._adapter_manager
        registered = inner.list_adapters()
        active = {n: i for i, n in enumerate(inner.lora_index_to_id) if n in registered}
        news: dict[int, bytes | None] = {}
        for number in [number for number in self._slots if number not in active]:
            del self._slots[number]
            news[number] = GONE
        for number, index in active.items():
            slot = self._slots.get(number)
            if slot is None or not slot.holds(index, registered[number]):
                slot = _Slot(index, registered[number], list(_slot_tensors(inner, index)))
                self._slots[number] = slot
                news[number] = slot.digest
        return news

    def load(self, requests: Sequence[Any]) -> dict[int, bytes | None]:
        """Digests of adapters, loaded as vLLM would for requests that are about to run."""
        failed = set()
        for request in requests:
            try:
                if self._manager is not None:
                    self._manager.add_adapter(request)
            except Exception as error:  # the request itself will fail, or not, without us
                logger.warning("kvtc: the LoRA adapter %s can't be loaded: %s", request, error)
                failed.add(int(request.lora_int_id))
        news = self.refresh()
        for number in (int(request.lora_int_id) for request in requests):
            slot = self._slots.get(number)
            news[number] = None if slot is None or number in failed else slot.digest
        return news

    def forget(self) -> None:
        """Digest all again at the next `refresh`: slots changed without a sign of it."""
        self._slots.clear()

    def is_loaded(self, number: int, digest: bytes) -> bool:
        """Whether the adapter has these contents, as of the last `refresh`."""
        slot = self._slots.get(number)
        return slot is not None and slot.digest == digest

    def sample(self, number: int) -> Sample:
        """An adapter's slot now, to be compared with what was digested."""
        slot = self._slots.get(number)
        return NEVER if slot is None else slot.sample()


class AdapterDigests:
    """Scheduler side: what the workers have said. Used by the scheduler's thread only."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._parts: dict[int, dict[int, bytes | None]] = {}
        self._last: dict[int, AdapterUse] = {}
        self._wanted: dict[int, Any] = {}

    def of(self, request: Request) -> AdapterUse | None:
        """What a request's names assume; None, and asked for, if that is not known."""
        number = adapter_id(request)
        if number is None:
            return NO_ADAPTER
        lora = getattr(request, "lora_request", None)
        # vLLM loads such an adapter again for every step: what is loaded now says nothing.
        again = getattr(lora, "load_inplace", False)
        known = None if again else self.known(number)
        if known is None:
            self._wanted[number] = lora
        return known

    def known(self, number: int) -> AdapterUse | None:
        """The adapter as all ranks have it loaded; None if some have not."""
        parts = self._parts.get(number, {})
        if len(parts) < self._ranks or not all(parts.values()):
            return None
        return AdapterUse(number, tuple(parts[rank] or b"" for rank in sorted(parts)))

    def is_nameless(self, number: int) -> bool:
        """Whether some rank can't tell what the adapter contains."""
        return None in self._parts.get(number, {}).values()

    def take_wanted(self) -> list[Any]:
        """Adapters that workers must load and digest, since the last call."""
        wanted, self._wanted = list(self._wanted.values()), {}
        return wanted

    def report(self, number: int, news: dict[int, bytes | None]) -> bool:
        """Digests by rank. True if the adapter's contents are others than they were."""
        self._parts.setdefault(number, {}).update(news)
        known = self.known(number)
        if known is None:
            return False
        before = self._last.get(number, known)
        self._last[number] = known
        return before != known


def _slot_tensors(manager: Any, index: int) -> Iterator[torch.Tensor]:
    """What LoRA layers compute with for the adapter in a slot, layer by layer."""
    seen = set()
    for module in manager.modules.values():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, value in sorted(vars(module).items()):
            if name.endswith(_STACKED):
                for tensor in _tensors(value):
                    yield tensor[index]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _digest(parts: Sequence[torch.Tensor]) -> bytes:
    """16 bytes over sizes and contents of uint8 tensors."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.numel().to_bytes(8, "little"))
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.digest()
