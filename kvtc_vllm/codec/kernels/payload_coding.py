"""The seam between what all codecs with kernels share and what is one codec's own.

A load or a store of any transform codec gathers and scatters rows, multiplies them by bases, and
entropy-codes units. How the coefficients of a section become the raw bytes of a payload, and what
else a blob says of them, is the codec's `PayloadCoding`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import SectionKey
from kvtc_vllm.codec.container import SectionKind
from kvtc_vllm.codec.entropy.unit_table import Lengths
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import NON_FINITE
from kvtc_vllm.codec.kernels.chunks import RowLayout
from kvtc_vllm.codec.kernels.resident import ResidentArtifact
from kvtc_vllm.codec.kernels.unit_coders import PlacedSections
from kvtc_vllm.codec.kernels.verified import VerifiedBlob
from kvtc_vllm.codec.section_coder import SectionCoder

Marks = npt.NDArray[np.bool_]
DEFLATE_SCRATCH = 4
"""Bytes for each byte of a payload while it is coded: itself, room for the worst unit, what was
made of it."""
NO_MARKS: Marks = np.zeros(0, np.bool_)


def count_marked(marks: Sequence[Marks]) -> Lengths:
    """How many tokens of each chunk are marked, int64 [n]; one look at all of them."""
    ends = np.cumsum([0, *map(len, marks)])
    sums = np.concatenate([np.zeros(1, np.int64), *marks]).cumsum()[ends]
    return np.diff(sums)


@dataclass(frozen=True)
class StoredPayloads:
    """The payloads of one verified blob.

    first: number of its first coded section. lengths: raw bytes of each coded section, int64 [n].
    marks: bool [N], which of the coded tokens are marked; empty if blobs of the codec do not say.
    """

    first: int
    lengths: Lengths
    marks: Marks = field(default_factory=lambda: NO_MARKS)


@dataclass(frozen=True)
class PayloadPlan:
    """Where the payloads of a step of a load go.

    placed: places in a buffer of `nbytes`. numbers: int64, whatever else the codec's kernels read
    of the step, which crosses to the device with the step's other tables. marked: rows of marked
    tokens.
    """

    placed: PlacedSections
    nbytes: int
    numbers: Lengths
    marked: int = 0


@dataclass(frozen=True)
class StepPayloads:
    """The payloads of a step of a load, on the device.

    table: `RowLayout.table`. numbers: those of the plan. data: uint8 [nbytes]. flags: int32, of
    each chunk; set to a key of `PayloadCoding.failures` for one that is damaged. own: what
    `PayloadCoding.memory` gave.
    """

    layout: RowLayout
    table: torch.Tensor
    numbers: torch.Tensor
    data: torch.Tensor
    flags: torch.Tensor
    own: tuple[torch.Tensor, ...]
    marked: int


@dataclass(frozen=True)
class RawPayloads:
    """The payloads of a step of a store, cut into units and not yet entropy coded.

    layout: of the chunks that they are of. data: uint8, on the device. starts, lengths: of each
    unit in data, int64; chunk after chunk, and in it section after section. units: how many every
    section has, int64 [chunks, sections]. coder_ids: of every section, the same shape. magnitudes:
    int32 [chunks] on the device, bits of a float32 that `PayloadCoding.check` understands.
    left_out: places, in the layout that was asked for, of chunks that need another step; never all.
    """

    layout: RowLayout
    data: torch.Tensor
    starts: Lengths
    lengths: Lengths
    units: Lengths
    coder_ids: Lengths
    magnitudes: torch.Tensor
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class CodedSizes:
    """What the coded sections of a step's chunks take.

    magnitudes: float64 [chunks], of `RawPayloads.magnitudes`. sizes: int64 [chunks, sections, 3]:
    units, raw and stored bytes. tokens: coded ones of each chunk, int64. marked: how many of them
    are.
    """

    magnitudes: npt.NDArray[np.float64]
    sizes: Lengths
    tokens: Lengths
    marked: Lengths


class PayloadCoding(ABC):
    """Coefficients <-> payloads of one codec and artifact at one ratio. Thread-safe.

    failures: why a chunk of a load is refused, by what its flag was set to. plans: the section
    coders, in the order of the container.
    """

    failures: ClassVar[Mapping[int, str]]
    plans: Mapping[SectionKey, SectionCoder]

    def __init__(self, resident: ResidentArtifact) -> None:
        self.resident = resident

    @abstractmethod
    def stored(self, blob: VerifiedBlob, coded: int) -> StoredPayloads:
        """Of a blob with `coded` coded tokens, at least one. Raises ContainerError."""

    def stored_in(
        self, blobs: Sequence[VerifiedBlob], coded: Sequence[int]
    ) -> list[StoredPayloads | ContainerError]:
        """`stored` of many blobs, or why there is none. coded: tokens of each, at least one."""
        found: list[StoredPayloads | ContainerError] = []
        for blob, tokens in zip(blobs, coded, strict=True):
            try:
                found.append(self.stored(blob, tokens))
            except ContainerError as error:
                found.append(error)
        return found

    @abstractmethod
    def chunk_room(self, tokens: int) -> tuple[int, int]:
        """Bytes for the payloads of a chunk with so many coded tokens: as a rule, and at most."""

    def payload_room(self, chunks: int, tokens: int) -> int:
        """Bytes for the payloads of a step of a load; more are in another step.

        Enough for whatever one chunk may have.
        """
        usual, most = self.chunk_room(tokens)
        return max(chunks * usual, most)

    @abstractmethod
    def marked_room(self, chunks: int, tokens: int) -> int:
        """Marked tokens of a step of a load; more are in another step. As `payload_room`."""

    @abstractmethod
    def usual_marked(self, tokens: int) -> int:
        """Marked tokens of a chunk with so many coded tokens, as a rule at most."""

    @abstractmethod
    def memory(self, chunks: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Device memory of a step of a load beside payloads, coefficients and rows.

        Raises torch.OutOfMemoryError.
        """

    @abstractmethod
    def memory_bytes(self, tokens: int) -> int:
        """Bytes of `memory` for each chunk of a step."""

    @abstractmethod
    def plan(self, layout: RowLayout, stored: Sequence[StoredPayloads]) -> PayloadPlan:
        """Of a step's chunks, in the order of the layout."""

    @abstractmethod
    def coefficients(self, tokens: int, marked: int) -> int:
        """Elements for the coefficients that a step of a load has at a time.

        tokens: coded ones. marked: how many of them are.
        """

    @abstractmethod
    def decode(self, step: StepPayloads, coefficients: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows without mean of all tokens of a step. Launches and does not wait.

        coefficients: room for `PayloadCoding.coefficients` in the operand dtype. rows: out, [R + M,
        P] of all sections: of R coded tokens, then of the M marked ones among them, see `others`.
        """

    def others(self, step: StepPayloads) -> torch.Tensor | None:
        """int64 [R]: i > 0 for a token whose row is row R + i - 1; None if there are none."""
        return None

    @property
    @abstractmethod
    def sections(self) -> list[tuple[SectionKind, int]]:
        """Section kind and layer group of the coded sections of a blob, in order."""

    @abstractmethod
    def payload_bytes(self, tokens: int) -> int:
        """Of a chunk with so many coded tokens, about."""

    def stored_bytes(self, tokens: int) -> int:
        """The same when they are entropy coded, at most about."""
        return self.payload_bytes(tokens)

    @abstractmethod
    def encode_bytes(self, tokens: int) -> int:
        """Device memory that encoding a chunk of so many coded tokens takes, about."""

    @abstractmethod
    def encode(
        self,
        layout: RowLayout,
        rows: torch.Tensor,
        marks: Mapping[int, Marks],
    ) -> RawPayloads:
        """Payloads of a step's chunks.

        rows: [R, P] of all sections, without mean, in the operand dtype. marks: bool [N] of each
        member of the layout; empty if blobs do not say.
        """

    @abstractmethod
    def doubtful(self, coded: CodedSizes) -> Marks:
        """bool [chunks]: those that `check` may refuse. The others need no look of their own."""

    @abstractmethod
    def check(self, coded: CodedSizes, place: int) -> None:
        """Raise CodecError if one of the chunks cannot be stored."""


def row_magnitudes(x: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Bits of the largest absolute value of each chunk's rows [R, p] as float32: int32 [chunks].

    Rows that nothing is stored of must be finite, too.
    """
    ends = zip(layout.first_rows, layout.first_rows[1:], strict=False)
    return torch.stack([x[a:b].abs().float().view(torch.int32).max() for a, b in ends])


def check_finite(magnitude: float) -> None:
    """Raise CodecError for infinity and NaN."""
    if not magnitude < math.inf:
        raise CodecError("non_finite", NON_FINITE)
