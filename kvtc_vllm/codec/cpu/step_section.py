"""The payload of a step plan by compiled loops. Imports numba."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.cpu.bits import float_of
from kvtc_vllm.codec.cpu.levels import (
    count_escapes,
    decode_columns,
    encode_columns,
    value_tables,
)
from kvtc_vllm.codec.cpu.rows import Bytes, Floats, scale_rows
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.entropy import EntropyCoder
from kvtc_vllm.codec.packing import packed_size
from kvtc_vllm.codec.section_coder import CodedSection
from kvtc_vllm.codec.v2.codes import MAX_LEVEL, WIDE, WIDE_BYTES, uneven_escapes
from kvtc_vllm.codec.v2.plan import StepPlan


class StepSection(FastSection):
    """`StepPlan`'s. Columns are held by falling width, so that those of one width are neighbours
    and the largest coefficients come first.
    """

    def __init__(
        self,
        section: SectionBasis,
        plan: StepPlan,
        int8: bool | None,
        offset: int = 0,
        of_marked: FastSection | None = None,
    ) -> None:
        """offset: columns of the basis before the plan's first."""
        self.plan = plan
        held = [part.columns.tolist() for part in reversed(self.plan.packed)]
        order = [column for columns in held for column in columns]
        ends = np.cumsum([0, *map(len, held)]).tolist()
        places = [slice(a, b) for a, b in pairwise(ends)]
        # In stored order.
        self._parts = [
            (part.width, place)
            for part, place in zip(self.plan.packed, reversed(places), strict=True)
        ]
        self._classes = self.plan.classes.numpy().astype(np.int64)[order]
        self._values = self.plan.values.numpy()
        self._tables = value_tables(self._values, self.plan.widths.numpy(), self.plan.step)
        rounding = self.plan.rounding.numpy()[self._classes].T
        self._dead, self._offset = np.ascontiguousarray(rounding)
        columns = [offset + column for column in order]
        super().__init__(section, self.plan, columns, columns, int8, of_marked)
        if plan.beyond is not None:
            self.beyond = StepSection(section, plan.beyond, int8, offset + plan.rank, self)

    def store(self, product: torch.Tensor, factors: Floats, entropy: EntropyCoder) -> CodedSection:
        return self.plan.store(self.payload(product, factors), len(product), entropy)

    def payload(self, product: torch.Tensor, factors: Floats) -> list[bytes]:
        coefficients = product.numpy()
        inverse_step = np.float32(self.plan.inverse_step)
        largest = np.float32(float_of(scale_rows(coefficients, factors)))
        if not largest * inverse_step < MAX_LEVEL:
            raise self.plan.range_error()
        tokens = len(coefficients)
        streams: list[bytes] = []
        escapes: list[bytes] = []
        wides: list[bytes] = []
        for width, place in self._parts:
            columns = place.stop - place.start
            packed = np.empty((columns, packed_size(tokens, width)), np.uint8)
            low = np.empty(columns * tokens, np.uint8)
            wide = np.empty(columns * tokens, np.int64)
            lows, count = encode_columns(
                coefficients,
                place.start,
                inverse_step,
                self._dead[place],
                self._offset[place],
                width,
                packed,
                low,
                wide,
            )
            streams.append(packed.tobytes())
            escapes.append(low[:lows].tobytes())
            wides.append(wide[:count].astype("<u2").tobytes())
        return [stream for stream in (*streams, *escapes, b"".join(wides)) if stream]

    def coefficients(self, payload: bytearray, out: Floats) -> None:
        data = np.frombuffer(payload, np.uint8)
        tokens = len(out)
        sizes = [(p.stop - p.start) * packed_size(tokens, width) for width, p in self._parts]
        packed = _split(data, sizes)
        at = sum(sizes)
        counts = [
            count_escapes(p, tokens, w) for p, (w, _) in zip(packed, self._parts, strict=True)
        ]
        if at + sum(counts) > len(data):
            raise uneven_escapes()
        low = _split(data[at:], counts)
        at += sum(counts)
        wides = [WIDE_BYTES * int(np.count_nonzero(part == WIDE)) for part in low]
        if at + sum(wides) != len(data):
            raise uneven_escapes()
        wide = _split(data[at:], wides)
        for i, (width, place) in enumerate(self._parts):
            decode_columns(
                packed[i].reshape(-1, packed_size(tokens, width)),
                low[i],
                wide[i],
                self._classes[place],
                self._values,
                self._tables,
                np.float32(self.plan.step),
                width,
                place.start,
                out,
            )


def _split(data: Bytes, sizes: list[int]) -> list[Bytes]:
    """Pieces of these sizes from the front of data."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [data[a:b] for a, b in pairwise(ends)]
