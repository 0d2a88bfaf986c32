"""Version 2's section coder: one step, classes of coefficients, integer codes.

A coefficient is divided by the step and rounded to a level. Coefficients of like deviation are one
*class*, which has the width of its packed codes, the value of every level (the mean of what
calibration rounded to it), and how the encoder rounds: below the dead zone to 0, above it down
after an offset is added. Rounding is the encoder's own affair; a decoder needs none of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvtc_vllm.codec.artifact import SectionBasis, SectionKey
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.entropy import GENERAL_CODER_IDS, UNIT_BYTES, EntropyCoder
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.section_coder import CodedSection, CoderTensors, read_body
from kvtc_vllm.codec.transform import magnitude
from kvtc_vllm.codec.v2.codes import (
    MAX_LEVEL,
    WIDTHS,
    PackedColumns,
    decode_codes,
    encode_codes,
    least_length,
    most_length,
    packed_columns,
)

HEADROOM = 2.0
"""A section may take so many times the bytes that it takes on calibration data. What takes more is
unlike that data, and is not stored."""
TOLERANCE = 1.05
"""Bytes on calibration data over those of the target ratio, at most."""
SLACK_BYTES = 1024
"""Of a section: unit tables, Huffman tables and padding of chunks however short."""
ELEMENT_BYTES = 2
"""Target ratios are to a cache of 16-bit elements."""
MAX_CLASSES = 256
MAX_SINK_GAIN = 256
BEYOND = "beyond"
"""Begins the names of the tensors of a plan's `beyond`."""
_NUMBERS = struct.Struct("<ddd")


@dataclass(frozen=True, eq=False)
class StepPlan:
    """How the coefficients of one section are coded at one target ratio; a `SectionCoder`.

    step: in units of coefficients, a float32. classes: uint8 [r], the class of each of the leading
    r coefficients; the others are not stored. widths: uint8 [C], bits of a class's packed codes.
    values: float32 [C, M], what levels 1 .. M of a class stand for, in units of coefficients;
    a level beyond them stands for itself times step. rounding: float32 [C, 2], dead zone and offset
    of a class in steps. sink_gain: marked tokens are multiplied by it before they are coded.
    token_bytes: bytes per coded token on calibration data, all of them. beyond: the plan of the
    coefficients after these, which are coded for marked tokens alone; its bytes are in
    token_bytes, and its own are per marked token.
    """

    step: float
    classes: torch.Tensor
    widths: torch.Tensor
    values: torch.Tensor
    rounding: torch.Tensor
    sink_gain: float
    token_bytes: float
    expected_error: float
    beyond: StepPlan | None = None

    @property
    def total_rank(self) -> int:
        return self.rank + (0 if self.beyond is None else self.beyond.rank)

    @property
    def rank(self) -> int:
        return len(self.classes)

    @property
    def coder_ids(self) -> Collection[int]:
        return GENERAL_CODER_IDS

    @cached_property
    def packed(self) -> tuple[PackedColumns, ...]:
        """The coefficients of every width in use, in stored order."""
        return packed_columns(self.widths[self.classes.long()])

    @cached_property
    def inverse_step(self) -> float:
        """1 / step, rounded to float32."""
        return float(torch.tensor(1.0) / torch.tensor(self.step))

    def raw_length(self, tokens: int) -> int:
        return least_length(self.packed, tokens)

    def most_raw_length(self, tokens: int) -> int:
        return most_length(self.packed, tokens)

    def max_bytes(self, tokens: int) -> int:
        return math.ceil(HEADROOM * self.token_bytes * tokens) + self.total_rank + SLACK_BYTES

    def encode(self, coefficients: torch.Tensor, entropy: EntropyCoder) -> CodedSection:
        streams = encode_codes(self.quantise(coefficients), self.packed)
        return self.store(streams, len(coefficients), entropy)

    def store(self, streams: list[bytes], tokens: int, entropy: EntropyCoder) -> CodedSection:
        """Of a payload's streams. Raises CodecError("size") if they take more than they may."""
        encoded = entropy.encode(streams)
        self.check_size(len(encoded.body) + UNIT_BYTES * len(encoded.units), tokens)
        return CodedSection(entropy.coder_id, sum(map(len, streams)), encoded)

    def check_size(self, taken: int, tokens: int) -> None:
        """Raise CodecError("size") if tokens take more bytes in a blob than they may."""
        if taken > self.max_bytes(tokens):
            raise CodecError(
                "size",
                f"a section of {tokens} tokens takes {taken} bytes, at most "
                f"{self.max_bytes(tokens)} are kept; it is unlike the calibration data",
            )

    def decode(
        self, section: Section, body: memoryview, tokens: int, device: torch.device
    ) -> torch.Tensor:
        payload = read_body(section, body)
        return self.restore(decode_codes(payload, self.packed, self.rank, tokens, device))

    def quantise(self, coefficients: torch.Tensor) -> torch.Tensor:
        """float32 [T, >= r] -> codes int32 [r, T]: 2 |level|, less 1 where x is positive.

        Raises CodecError("range") for a coefficient of more than `MAX_LEVEL` steps and for NaN.
        """
        rows = coefficients[:, : self.rank].T
        scaled = rows.abs() * self.inverse_step
        if not magnitude(scaled) < MAX_LEVEL:
            raise self.range_error()
        dead, offset = self.rounding.to(rows.device)[self.classes.long()].T[..., None]
        levels = torch.floor(scaled + offset).int()
        levels[scaled < dead] = 0
        return (2 * levels - (rows > 0).int()).clamp_min(0)

    def range_error(self) -> CodecError:
        """What to raise for a coefficient that has no code."""
        return CodecError("range", f"a coefficient is beyond {MAX_LEVEL} steps of {self.step:g}")

    def restore(self, codes: torch.Tensor) -> torch.Tensor:
        """Inverse of `quantise` but for the rounding: float32 [T, r]."""
        levels = (codes + 1) >> 1
        listed = self.values.shape[1]
        table = torch.nn.functional.pad(self.values, (1, 0)).to(codes.device)
        own = table[self.classes.long().to(codes.device)]
        sizes = own.gather(1, levels.clamp_max(listed).long())
        sizes = torch.where(levels > listed, levels.float() * self.step, sizes)
        return torch.where((codes & 1).bool(), sizes, -sizes).T.contiguous()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """numbers: float64 [3]: step, gain of marked tokens, bytes per token."""
        found = {
            "classes": self.classes,
            "widths": self.widths,
            "values": self.values,
            "rounding": self.rounding,
            "numbers": torch.tensor(self._numbers, dtype=torch.float64),
        }
        if self.beyond is None:
            return found
        return found | {BEYOND + name: tensor for name, tensor in self.beyond.tensors().items()}

    def fingerprint_bytes(self) -> bytes:
        """Without the expected error, which changes no output."""
        tensors = (self.classes, self.widths, self.values, self.rounding)
        shapes = repr([tuple(tensor.shape) for tensor in tensors]).encode()
        contents = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
        beyond = b"" if self.beyond is None else self.beyond.fingerprint_bytes()
        return shapes + _NUMBERS.pack(*self._numbers) + contents + beyond

    @property
    def _numbers(self) -> tuple[float, float, float]:
        return self.step, self.sink_gain, self.token_bytes


def read_step_plan(
    tensors: CoderTensors, ratio: float, expected_error: float, rank: int
) -> StepPlan:
    """Inverse of `StepPlan.tensors`, for a basis of `rank` columns. Raises ArtifactError."""
    plan = _read_plan(tensors, "", expected_error, rank)
    if not tensors.has(BEYOND + "numbers"):
        return plan
    beyond = _read_plan(tensors, BEYOND, expected_error, rank - plan.rank)
    if (beyond.step, beyond.sink_gain) != (plan.step, plan.sink_gain):
        raise tensors.error(BEYOND + "numbers", "must have the step and gain of the plan")
    return replace(plan, beyond=beyond)


def _read_plan(source: CoderTensors, prefix: str, expected_error: float, rank: int) -> StepPlan:
    tensors = _Prefixed(source, prefix)
    numbers = tensors.load("numbers", ("F64",), (3,))
    step, gain, token_bytes = numbers.tolist()
    rounded = float(numbers[0].float())
    if step != rounded or not 1e-30 < step < 1e30:
        raise tensors.error("numbers", f"has step {step}; a float32 in 1e-30 .. 1e30 is right")
    if not 1 <= gain <= MAX_SINK_GAIN:
        raise tensors.error(
            "numbers", f"has gain {gain} of marked tokens; 1 to {MAX_SINK_GAIN} are right"
        )
    if token_bytes < 0:
        raise tensors.error("numbers", f"has {token_bytes} bytes per token")
    widths = tensors.load("widths", ("U8",), (None,))
    if not 1 <= len(widths) <= MAX_CLASSES or not set(widths.tolist()) <= set(WIDTHS):
        raise tensors.error(
            "widths", f"are {widths.tolist()}; 1 to {MAX_CLASSES} of {WIDTHS} are right"
        )
    classes = tensors.load("classes", ("U8",), (None,))
    if len(classes) > rank or (len(classes) and int(classes.max()) >= len(widths)):
        raise tensors.error(
            "classes",
            f"are {len(classes)} of at most {rank} coefficients, and must be below {len(widths)}",
        )
    values = tensors.load("values", ("F32",), (len(widths), None))
    if not values.numel() or float(values.min()) <= 0:
        raise tensors.error("values", "must be positive, at least one per class")
    rounding = tensors.load("rounding", ("F32",), (len(widths), 2))
    if float(rounding.min()) < 0 or float(rounding.max()) > MAX_LEVEL:
        raise tensors.error("rounding", f"must be 0 to {MAX_LEVEL}")
    return StepPlan(step, classes, widths, values, rounding, gain, token_bytes, expected_error)


@dataclass(frozen=True)
class _Prefixed:
    """The tensors whose names begin so."""

    source: CoderTensors
    prefix: str

    def load(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> torch.Tensor:
        return self.source.load(self.prefix + name, dtypes, shape)

    def error(self, name: str, problem: str) -> ArtifactError:
        return self.source.error(self.prefix + name, problem)


def step_plan(section: SectionBasis, ratio: float) -> StepPlan:
    """The section's plan at a ratio. Raises ArtifactError if it is another codec's."""
    plan = section.plans[ratio]
    if not isinstance(plan, StepPlan):
        raise ArtifactError(f"{type(plan).__name__} is not a plan of version 2")
    return plan


def over_ratio(sections: Mapping[SectionKey, SectionBasis]) -> str | None:
    """Which ratio all sections together miss on calibration data, in words; None if none."""
    row = sum(section.basis.shape[0] for section in sections.values())
    for ratio in sorted(set.intersection(*(set(s.plans) for s in sections.values()))):
        taken = sum(step_plan(section, ratio).token_bytes for section in sections.values())
        allowed = TOLERANCE * ELEMENT_BYTES * row / ratio
        if taken > allowed:
            return (
                f"plans of ratio {ratio:g} take {taken:.1f} bytes per token on calibration data, "
                f"at most {allowed:.1f} are right"
            )
    return None


def most_bytes(row_elements: int, ratio: float, tokens: int) -> int:
    """Most bytes of the K and V sections of a layer group together, if all groups are alike.

    row_elements: of a row of K and one of V. Over all layer groups it is an upper bound for any
    plans that `over_ratio` lets pass.
    """
    per_token = HEADROOM * TOLERANCE * ELEMENT_BYTES * row_elements / ratio
    # K and V round up apart.
    return math.ceil(per_token * tokens) + row_elements + 2 * (SLACK_BYTES + 1)
