"""What a chunk stores of one section, from a tile's products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.cpu.products import Operand
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.cpu.tiles import Span
from kvtc_vllm.codec.entropy import EntropyCoder
from kvtc_vllm.codec.marks import NOTHING_CODED, check_room
from kvtc_vllm.codec.section_coder import CodedSection

_ONE = np.float32(1.0)


def stored_sections(
    section: FastSection,
    product: torch.Tensor,
    operand: Operand,
    span: Span,
    marks: npt.NDArray[np.bool_] | None,
    entropy: EntropyCoder,
) -> list[CodedSection]:
    """The coefficients of a chunk's tokens, and if it has marks, what marked ones have beyond.

    product: of all rows of the tile; the chunk's are overwritten. marks: of its coded tokens.
    Raises CodecError as `SectionCoder.encode` does.
    """
    factors = operand.factors[span.rows]
    if marks is None:
        return [section.store(product[span.rows], factors, entropy)]
    gain = np.float32(section.sink_gain)
    coded = section.store(product[span.rows], factors * np.where(marks, gain, _ONE), entropy)
    beyond = NOTHING_CODED
    if section.beyond is not None and marks.any():
        own = operand.part(span.row + np.flatnonzero(marks))
        found = section.beyond.forward.of(own)
        beyond = section.beyond.store(found, own.factors * gain, entropy)
    check_room(section.coder, len(marks), coded, beyond)
    return [coded, beyond]
