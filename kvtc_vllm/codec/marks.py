"""What a blob has for marked tokens, the sinks: which they are, and coefficients of their own.

Marks are a bitmap: token i is bit i % 8 of byte i // 8, bit 0 being the least significant. Padding
bits are zero. Beside what all coded tokens have, marked ones have coefficients *beyond* the rank of
a section's plan, in a section that follows it.
"""

from __future__ import annotations

import numpy as np
import torch

from kvtc_vllm.codec.artifact import SectionName
from kvtc_vllm.codec.container import NewSection, Section, SectionKind, section_bytes
from kvtc_vllm.codec.entropy import RAW, UNIT_BYTES, aligned
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.section_coder import CodedSection, SectionCoder

NOTHING_CODED = CodedSection(RAW.coder_id, 0, RAW.encode([]))
BEYOND_KIND: dict[SectionName, SectionKind] = {
    "k": SectionKind.BEYOND_K,
    "v": SectionKind.BEYOND_V,
    "kv": SectionKind.BEYOND_PAIR,
}


def marks_length(tokens: int) -> int:
    """Bytes of the bitmap of so many tokens."""
    return (tokens + 7) // 8


def pack_marks(marks: torch.Tensor) -> bytes:
    """marks: bool [T], on any device."""
    return np.packbits(marks.cpu().numpy(), bitorder="little").tobytes()


def unpack_marks(bitmap: bytes | bytearray, tokens: int) -> torch.Tensor:
    """Inverse of `pack_marks`: bool [tokens] on the CPU. bitmap: `marks_length(tokens)` bytes.

    Raises ContainerError("bounds") if a padding bit is set.
    """
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    if bits[tokens:].any():
        raise ContainerError("bounds", "padding after the marks is not zero")
    return torch.from_numpy(bits[:tokens].astype(np.bool_))


def new_beyond_section(group: int, name: SectionName, coded: CodedSection) -> NewSection:
    """What marked tokens have beside what all have."""
    kind = BEYOND_KIND[name]
    return NewSection(kind, coded.coder_id, group, coded.raw_length, coded.encoded)


def check_room(plan: SectionCoder, tokens: int, coded: CodedSection, beyond: CodedSection) -> None:
    """Raise CodecError("size") if both, with what marks take, are more than a section may take."""
    parts = (coded.encoded, beyond.encoded)
    taken = sum(UNIT_BYTES * len(part.units) + aligned(len(part.body)) for part in parts)
    check_taken(plan, tokens, taken)


def around_marked(tokens: int) -> int:
    """Bytes of a blob around both sections of so many coded tokens: their entries and the marks."""
    return 2 * section_bytes(0) + aligned(marks_length(tokens))


def check_taken(plan: SectionCoder, tokens: int, taken: int) -> None:
    """As `check_room`. taken: bytes of both sections' units with their table."""
    taken += around_marked(tokens)
    if taken > plan.max_bytes(tokens):
        raise CodecError(
            "size",
            f"a section of {tokens} tokens and its sinks take {taken} bytes, at most "
            f"{plan.max_bytes(tokens)} are kept; it is unlike the calibration data",
        )


def no_beyond(section: Section) -> None:
    """Raise ContainerError unless a section of coefficients past the rank is empty."""
    if section.raw_length:
        raise ContainerError("bounds", "no token is marked, but marked tokens have coefficients")
