"""What a baseline implements: K and V of a span of tokens <-> bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.evaluation.settings import Settings, resolve


class Baseline(ABC):
    """One storage method of another paper or product, written down exactly as it would be stored.

    Everything that `restore` needs and that differs from chunk to chunk must be in
    the bytes that `compress` returns: scales, zero points, indices, per-prompt bases.
    Only what is fitted once per model may live outside (as KVTC's own basis does).

    geometry: shape of the cache. dtype: cache dtype. ropes: rotary embedding of each
    layer, None where keys are not rotated; empty if there are none, or none are known.
    given: values of `settings`, by name; ValueError for others.
    Instances have no state that a call changes; they may be called from several
    threads at once.
    """

    name: ClassVar[str]
    """Key in `kvtc_vllm.evaluation.baselines.BASELINES`."""
    source: ClassVar[str]
    """Paper or product, and the settings followed."""
    whole_prompt: ClassVar[bool] = False
    """Needs all tokens of a prefix at once: it is then run with one chunk per prefix."""
    settings: ClassVar[Settings] = {}

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        ropes: Sequence[Rope | None] = (),
        **given: float,
    ) -> None:
        self.values = resolve(self.name, self.settings, given)
        if ropes and len(ropes) != geometry.num_layers:
            raise ValueError(f"{len(ropes)} rotary embeddings for {geometry.num_layers} layers")
        self.geometry = geometry
        self.dtype = dtype
        self.ropes: tuple[Rope | None, ...] = tuple(ropes) or (None,) * geometry.num_layers
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 - many have nothing to prepare
        """Make, once, of geometry, settings and statistics what every chunk needs.

        The constructor calls it last. Raises ValueError for a geometry that the method can't take.
        """

    @abstractmethod
    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        """k: [T, L, H, D] post-RoPE, v: [T, L, H, Dv], cache dtype, CPU, any strides.

        start: position of the first token. T is at least 1.
        """

    @abstractmethod
    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse of `compress`: k [T, L, H, D], v [T, L, H, Dv] in the cache dtype.

        parts: what `compress` returned, one view each, in order. tokens: T.
        """
