"""What chunks store of one section, from a tile's products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.cpu.products import Operand
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.cpu.tiles import Span
from kvtc_vllm.codec.entropy import EntropyCoder
from kvtc_vllm.codec.marks import NOTHING_CODED, check_room
from kvtc_vllm.codec.section_coder import CodedSection

_ONE = np.float32(1.0)


class TileProducts:
    """Coefficients of a tile's rows, and what marked rows of all its chunks have beyond.

    Both products are made at once: that of marked rows takes as long as reading its matrix.
    marks: by the chunk's number, of its coded tokens; of none where the codec marks nothing.
    """

    def __init__(
        self,
        section: FastSection,
        operand: Operand,
        spans: Sequence[Span],
        marks: Mapping[int, npt.NDArray[np.bool_]],
    ) -> None:
        self._section = section
        self._marks = marks
        self._factors = operand.factors
        self._product = section.forward.of(operand)
        self._places: dict[int, slice] = {}
        numbers = [np.zeros(0, np.int64)]
        end = 0
        for span in spans if section.beyond is not None else ():
            numbers.append(span.row + np.flatnonzero(marks[span.number]))
            self._places[span.number] = slice(end, end + len(numbers[-1]))
            end += len(numbers[-1])
        if section.beyond is not None and end:
            own = operand.part(np.concatenate(numbers))
            self._beyond = section.beyond.forward.of(own)
            self._beyond_factors = own.factors

    def stored(self, span: Span, entropy: EntropyCoder) -> list[CodedSection]:
        """What a chunk has of the section, and if it has marks, what marked tokens have beyond.

        Its coefficients are overwritten. Raises CodecError as `SectionCoder.encode` does.
        """
        section, product = self._section, self._product[span.rows]
        factors, marks = self._factors[span.rows], self._marks.get(span.number)
        if marks is None:
            return [section.store(product, factors, entropy)]
        gain = np.float32(section.sink_gain)
        coded = section.store(product, factors * np.where(marks, gain, _ONE), entropy)
        beyond = NOTHING_CODED
        if section.beyond is not None and marks.any():
            place = self._places[span.number]
            own = self._beyond_factors[place] * gain
            beyond = section.beyond.store(self._beyond[place], own, entropy)
        check_room(section.coder, len(marks), coded, beyond)
        return [coded, beyond]
