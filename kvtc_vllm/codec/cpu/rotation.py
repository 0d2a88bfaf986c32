"""The rotary embeddings of a layer group as arrays that compiled loops take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from kvtc_vllm.codec.cpu.rows import Floats
from kvtc_vllm.codec.rope import Rope

REMEMBERED = 64
"""Chunks whose angles are kept."""


class Rotation:
    """What turns the keys of a layer group, and turns them back. Any number of threads may ask.

    rope_of_layer: int64 [l], index of a layer's rope, -1 for none. halves: int64 [ropes], pairs
    per head that a rope turns. neox: int64 [ropes], 1 if the pairs are halves of a key apart.
    """

    def __init__(self, ropes: Sequence[Rope | None]) -> None:
        distinct = list({id(rope): rope for rope in ropes if rope is not None}.values())
        index = {id(rope): i for i, rope in enumerate(distinct)}
        self._ropes = distinct
        self.rope_of_layer = np.array([index.get(id(rope), -1) for rope in ropes], np.int64)
        self.halves = np.array([rope.rotary_dim // 2 for rope in distinct], np.int64)
        self.neox = np.array([rope.neox for rope in distinct], np.int64)
        # The chunks of a request are at the same positions as those of the one before it.
        self.angles = lru_cache(REMEMBERED)(self._angles)
        self.inverse_angles = lru_cache(REMEMBERED)(self._inverse_angles)

    def _angles(self, first: int, end: int) -> Floats:
        """Of positions first .. end - 1: float32 [ropes, T, 2, most halves], cos and sin."""
        most = int(self.halves.max(initial=0))
        found = np.zeros((len(self._ropes), end - first, 2, most), np.float32)
        for i, rope in enumerate(self._ropes):
            half = rope.rotary_dim // 2
            table = rope.cos_sin[first:end].to("cpu", torch.float32)
            found[i, :, :, :half] = table.view(end - first, 2, half).numpy()
        return found

    def _inverse_angles(self, first: int, end: int) -> Floats:
        """What turns keys back: (cos, -sin) over cos^2 + sin^2, zero past a rope's halves."""
        found = self._angles(first, end)
        squares = np.square(found).sum(axis=2, keepdims=True)
        np.divide(found, squares, out=found, where=squares > 0)
        found[:, :, 1] *= -1
        return found
