"""LoRA adapters by the contents that were loaded, not by the files that a path names now.

An adapter's files may be replaced at any time, while workers compute with what they read
before. So a worker digests the tensors that vLLM keeps of each adapter, whenever a new object
stands for it, and tells the scheduler, which names chunks by the digests (`AdapterDigests`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import xxhash
from vllm.logger import init_logger

logger = init_logger("vllm.kvtc")

GONE = b""
"""Digest of an adapter that was loaded and is not any more."""


def adapter_id(request: Any) -> int | None:
    """vLLM's number of a request's adapter; None without one."""
    lora = getattr(request, "lora_request", None)
    return None if lora is None else int(lora.lora_int_id)


class LoadedAdapters:
    """Worker side. Used by the engine's thread only. manager: vLLM's, None without LoRA."""

    def __init__(self, manager: Any | None) -> None:
        self._manager = manager
        self._seen: dict[int, tuple[weakref.ref[Any], bytes | None]] = {}

    def refresh(self) -> dict[int, bytes | None]:
        """Digests that changed since the last call; GONE, or None where there can't be one."""
        if self._manager is None:
            return {}
        news: dict[int, bytes | None] = {}
        registered = self._manager._adapter_manager.list_adapters()
        for number in [number for number in self._seen if number not in registered]:
            del self._seen[number]
            news[number] = GONE
        for number, adapter in registered.items():
            known = self._seen.get(number)
            if known is None or known[0]() is not adapter:
                news[number] = _digest(adapter)
                self._seen[number] = (weakref.ref(adapter), news[number])
        return news

    def load(self, requests: Sequence[Any]) -> dict[int, bytes | None]:
        """Digests of adapters, loaded as vLLM would for a request that is about to run."""
        answers: dict[int, bytes | None] = {}
        for request in requests:
            number = int(request.lora_int_id)
            try:
                self._load(request)
            except Exception as error:  # the request itself will fail, or not, without us
                logger.warning("kvtc: the LoRA adapter %s can't be read: %s", request, error)
                answers[number] = None
        news = self.refresh()
        for request in requests:
            number = int(request.lora_int_id)
            if number not in answers:
                answers[number] = self._seen[number][1] if number in self._seen else None
        return {**news, **answers}

    def is_loaded(self, number: int, digest: bytes) -> bool:
        """Whether the adapter has these contents, as of the last `refresh`."""
        known = self._seen.get(number)
        return known is not None and known[1] == digest

    def _load(self, request: Any) -> None:
        if self._manager is None:
            return
        in_place = getattr(request, "load_inplace", False)
        if in_place or request.lora_int_id not in self._manager.list_adapters():
            self._manager.add_adapter(request)


class AdapterDigests:
    """Scheduler side: what the workers have said. Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._loaded: dict[int, bytes] = {}
        self._last: dict[int, bytes] = {}
        self._wanted: dict[int, Any] = {}

    def of(self, request: Any) -> bytes | None:
        """Digest of a request's adapter, b"" without one; None, and asked for, if not known."""
        number = adapter_id(request)
        if number is None:
            return b""
        # vLLM loads such an adapter again for every step: what is loaded now says nothing.
        again = getattr(request.lora_request, "load_inplace", False)
        if number in self._loaded and not again:
            return self._loaded[number]
        self._wanted[number] = request.lora_request
        return None

    def take_wanted(self) -> list[Any]:
        """Adapters that workers must load and digest, since the last call."""
        wanted, self._wanted = list(self._wanted.values()), {}
        return wanted

    def report(self, number: int, digest: bytes | None) -> bool:
        """A worker's word. True if the adapter's contents are others than they were."""
        self._loaded.pop(number, None)
        if not digest:
            return False
        self._loaded[number] = digest
        before = self._last.get(number, digest)
        self._last[number] = digest
        return before != digest


def _digest(adapter: Any) -> bytes | None:
    """16 bytes over names, ranks, scalings and tensors of an adapter; None if one can't be read."""
    digest = xxhash.xxh3_128()
    try:
        for name, weights in sorted(adapter.loras.items()):
            digest.update(f"{name} {weights.rank} {weights.scaling}".encode())
            for tensor in _tensors((weights.lora_a, weights.lora_b)):
                if tensor is None:
                    digest.update(b"none")
                    continue
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("kvtc: a LoRA adapter can't be digested, its chunks are not kept: %s", error)
        return None
    return digest.digest()


def _tensors(part: Any) -> Iterator[torch.Tensor | None]:
    """Tensors of nested lists, depth first; None where a packed layer has no adapter."""
    if isinstance(part, (list, tuple)):
        for inner in part:
            yield from _tensors(inner)
    else:
        yield part
