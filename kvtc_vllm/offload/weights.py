"""Whether the live weights are still those that a name stands for.

Files say what an engine started from, not what it computes with now: `reload_weights`, weight
transfers of a trainer and sleep change weights in place, and nothing tells a connector. So the
live parameters themselves are sampled: densely when a name is made, sparsely in every step that
stores or loads. An update of the whole model can't pass between the samples.

vLLM's CPU build packs most weights into objects that nobody can read. A new such object means
"loaded again"; what it holds stays unknown, and so such a state gets a name that is never made
twice.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import xxhash
from torch import nn

from kvtc_vllm.offload.word_sample import ALWAYS, NEVER, Sample, WordSampler

_PACKED_CLASS = "CPUDNNLGEMMHandler"


@dataclass(frozen=True)
class _Tensor:
    """A weight and where it was found. address: of its data."""

    holder: dict[str, Any]
    name: str
    tensor: torch.Tensor
    address: int

    @property
    def moved(self) -> bool:
        return self.holder.get(self.name) is not self.tensor or (
            self.tensor.data_ptr() != self.address
        )


@dataclass(frozen=True)
class _Packed:
    """An object that holds weights which can't be read."""

    holder: dict[str, Any]
    name: str
    content: weakref.ref[Any]

    @property
    def replaced(self) -> bool:
        return self.holder.get(self.name) is not self.content()


class Unwatched:
    """Weights that are known to stay as they are: in tests, and when a worker has ended."""

    def digest(self) -> bytes:
        """Nothing to tell apart."""
        return b""

    def sample(self, dense: bool = False) -> Sample:
        """One that always matches."""
        return ALWAYS


class WeightsWatch:
    """Samples of the parameters of `roots`. Used by the engine's thread only.

    moving: part of the names of tensors that the engine itself moves while it runs, which are
    left out.
    """

    def __init__(self, roots: Sequence[nn.Module], moving: str | None = None) -> None:
        self._roots = roots
        self._moving = moving
        self._unknown = b""
        self._find()

    def digest(self) -> bytes:
        """16 bytes over the present weights, to which later samples are compared; blocks."""
        if self._packed_again():
            self._unknown = os.urandom(16)
        self._find()
        digest = xxhash.xxh3_128(self._sampler.refer().numpy().tobytes())
        for found in self._tensors:
            digest.update(f"{tuple(found.tensor.shape)} {found.tensor.dtype}".encode())
        digest.update(self._unknown)
        return digest.digest()

    def sample(self, dense: bool = False) -> Sample:
        """The weights now. On a GPU ordered after what the current stream was given so far."""
        if self._packed_again():
            return NEVER
        if any(found.moved for found in self._tensors):
            before = self._sampler
            self._find()
            self._sampler.adopt(before)
        return self._sampler.sample(dense)

    def _packed_again(self) -> bool:
        return any(found.replaced for found in self._packed)

    def _find(self) -> None:
        self._tensors = list(self._find_tensors())
        self._packed = [found for root in self._roots for found in _find_packed(root)]
        # Tensors may be views of one storage.
        storages = {found.tensor.untyped_storage().data_ptr(): found for found in self._tensors}
        self._sampler = WordSampler(_storage(found.tensor) for found in storages.values())

    def _find_tensors(self) -> Iterator[_Tensor]:
        for root in self._roots:
            for prefix, module in root.named_modules():
                buffers = module._non_persistent_buffers_set
                for holder in (module._parameters, module._buffers):
                    for name, tensor in holder.items():
                        if tensor is None or name in buffers or tensor.is_meta:
                            continue
                        full = f"{prefix}.{name}"
                        if tensor.numel() and not (self._moving and self._moving in full):
                            yield _Tensor(holder, name, tensor, tensor.data_ptr())


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    """All memory of which the tensor is a view, as uint8 [n]."""
    storage = tensor.untyped_storage()
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))


def _find_packed(root: nn.Module) -> Iterator[_Packed]:
    """Functions and handlers that replaced the weight of a module."""
    for module in root.modules():
        if not any(p is not None and not p.numel() for p in module._parameters.values()):
            continue
        for holder in _holders(module):
            for name, value in holder.items():
                if isinstance(value, FunctionType) or type(value).__name__ == _PACKED_CLASS:
                    yield _Packed(holder, name, weakref.ref(value))


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of a module and of the objects that compute for it."""
    yield vars(module)
    for name in ("quant_method", "scheme"):
        method = getattr(module, name, None)
        if hasattr(method, "__dict__"):
            yield vars(method)
            kernel = getattr(method, "kernel", None)
            if hasattr(kernel, "__dict__"):
                yield vars(kernel)
