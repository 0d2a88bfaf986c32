"""The plain reader's part for codec 2, written from section 9 of FORMAT.md with numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PlainStepSection(NamedTuple):
    """mean [p], basis [p, r], values [C, M] float32; classes [r], widths [C].

    beyond: the same of the plan beyond this one; its mean and basis are not used.
    """

    mean: np.ndarray
    basis: np.ndarray
    step: float
    classes: Sequence[int]
    widths: Sequence[int]
    values: np.ndarray
    gain: float
    beyond: PlainStepSection | None = None

    def add_beyond(self, payload: bytes, marks: Sequence[int], coefficients: np.ndarray) -> None:
        marked = np.flatnonzero(marks)
        if self.beyond is None or not len(marked):
            assert payload == b""
            return
        first = len(self.classes)
        columns = slice(first, first + len(self.beyond.classes))
        found = self.beyond.read(payload, [1] * len(marked))
        coefficients[marked, columns] = found[:, : len(self.beyond.classes)]

    def read(self, payload: bytes, marks: Sequence[int]) -> np.ndarray:
        tokens = len(marks)
        coefficients = np.zeros((tokens, self.basis.shape[1]), np.float32)
        codes: list[list[int]] = []
        places: list[tuple[int, int, int]] = []
        at = 0
        for width in (2, 4, 8):
            for column, number in enumerate(self.classes):
                if self.widths[number] != width:
                    continue
                size = (tokens * width + 7) // 8
                bits = int.from_bytes(payload[at : at + size], "little")
                at += size
                codes.append([bits >> t * width & (1 << width) - 1 for t in range(tokens)])
                places.append((column, number, (1 << width) - 1))
        wide: list[tuple[int, int]] = []
        for i, (_, _, escape) in enumerate(places):
            for t in range(tokens):
                if codes[i][t] == escape:
                    codes[i][t] += payload[at]
                    if payload[at] == 255:
                        wide.append((i, t))
                    at += 1
        for i, t in wide:
            codes[i][t] += payload[at] + 256 * payload[at + 1]
            at += 2
        assert at == len(payload)
        for (column, number, _), row in zip(places, codes, strict=True):
            for t, code in enumerate(row):
                coefficients[t, column] = self.value(code, number)
        coefficients[np.array(marks, bool)] /= np.float32(self.gain)
        return coefficients

    def value(self, code: int, number: int) -> np.float32:
        level = (code + 1) // 2
        if level == 0:
            return np.float32(0)
        listed = level <= self.values.shape[1]
        size = (
            self.values[number, level - 1] if listed else np.float32(level) * np.float32(self.step)
        )
        return size if code % 2 else -size
