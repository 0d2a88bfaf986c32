"""Version 1's section coder: a bit plan, and the payload that it makes of coefficients.

Coefficient groups, here called groups, are stored in *stored order*: ascending (type id, size,
start). Then the groups that share a quantiser and a size lie next to each other, and each such
batch is one tensor operation here and one regular strided region for a kernel.

Streams, in order; n groups, T tokens:

1. high bytes of all shifts     [n, T]
2. high bytes of all scales     [n, T]
3. low bytes of all shifts [n, T], then low bytes of all scales [n, T]
4. for every type in use: the packed codes of its groups one after the other, T * size codes
   each, token-major: the code of coefficient c of token t is element t * size + c.

Each stream is a unit of its own: one Huffman table for a mixture costs 6 to 8 %.
FORMAT.md has the measurements. Token-major and component-major codes come within
1.3 % of each other; token-major is the friendlier order for a decoder.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.container import Section
from kvtc_vllm.codec.entropy import GENERAL_CODER_IDS, EntropyCoder, max_stored_bytes
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.codec.packing import pack, packed_size, unpack
from kvtc_vllm.codec.quantizers import BY_TYPE_ID, REGISTRY, Quantizer
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.section_coder import CodedSection, CoderTensors, read_body
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.codec.transform import magnitude

FP16_BYTES = 2
SCALE_STREAMS = 3
"""Streams of shifts and scales, which come before those of codes."""
_GROUP = struct.Struct("<IIB")


@dataclass(frozen=True)
class CoefficientGroup:
    """`size` consecutive coefficients that share one shift and scale per token.

    `type` is a key of `kvtc_vllm.codec.quantizers.REGISTRY`.
    """

    start: int
    size: int
    type: str


@dataclass(frozen=True)
class BitPlan:
    """Output of the allocation for one target ratio; a `SectionCoder`.

    `groups` holds only groups that are stored (type other than "none"), in
    ascending order of `start`; coefficients in no group are zero.
    `predicted_error` is the relative squared error sum||x-x'||^2 / sum||x-mean||^2
    that the allocation computed on its own rows.
    """

    ratio: float
    groups: tuple[CoefficientGroup, ...]
    predicted_error: float

    @property
    def rank(self) -> int:
        """Number of leading basis columns that the plan reads."""
        return max((g.start + g.size for g in self.groups), default=0)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """See `batches`; kept here, because a hash of all groups at every look-up takes long."""
        found: list[Batch] = []
        first = 0
        ordered = sorted(self.groups, key=_stored_order)
        for (type_name, size), members in groupby(ordered, key=lambda g: (g.type, g.size)):
            starts = tuple(group.start for group in members)
            found.append(Batch(REGISTRY[type_name], size, first, starts))
            first += len(starts)
        return tuple(found)

    @property
    def expected_error(self) -> float:
        return self.predicted_error

    @property
    def beyond(self) -> None:
        return None

    @property
    def total_rank(self) -> int:
        return self.rank

    @property
    def sink_gain(self) -> float:
        return 1.0

    @property
    def coder_ids(self) -> Collection[int]:
        return GENERAL_CODER_IDS

    def raw_length(self, tokens: int) -> int:
        return payload_length(self, tokens)

    def most_raw_length(self, tokens: int) -> int:
        return payload_length(self, tokens)

    def max_bytes(self, tokens: int) -> int:
        return max_stored_bytes(stream_lengths(self, tokens))

    def encode(self, coefficients: torch.Tensor, entropy: EntropyCoder) -> CodedSection:
        if not magnitude(coefficients) <= FP16_MAX:
            raise CodecError("range", "a coefficient is outside the float16 range")
        streams = encode_payload(coefficients, self)
        raw_length = sum(map(len, streams))
        return CodedSection(entropy.coder_id, raw_length, entropy.encode(streams))

    def decode(
        self, section: Section, body: memoryview, tokens: int, device: torch.device
    ) -> torch.Tensor:
        return decode_payload(read_body(section, body), self, tokens, device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """plan: int32 [n, 3]: start, size, type id of each stored group."""
        rows = [[g.start, g.size, REGISTRY[g.type].type_id] for g in self.groups]
        return {"plan": torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)}

    def fingerprint_bytes(self) -> bytes:
        """Without the predicted error, which changes no output."""
        rows = ((g.start, g.size, REGISTRY[g.type].type_id) for g in self.groups)
        return struct.pack("<I", len(self.groups)) + b"".join(_GROUP.pack(*row) for row in rows)


def read_plan(tensors: CoderTensors, ratio: float, expected_error: float, rank: int) -> BitPlan:
    """Inverse of `BitPlan.tensors`, for a basis of `rank` columns. Raises ArtifactError."""
    groups = []
    free_from = 0
    for start, size, type_id in tensors.load("plan", ("I32",), (None, 3)).tolist():
        if type_id not in BY_TYPE_ID:
            raise tensors.error("plan", f"has type {type_id}, known are {sorted(BY_TYPE_ID)}")
        if start < free_from or size < 1 or start + size > rank:
            raise tensors.error(
                "plan",
                f"has a group {start}..{start + size} that overlaps, is out of order, "
                f"or passes the {rank} columns of the basis",
            )
        free_from = start + size
        groups.append(CoefficientGroup(start, size, BY_TYPE_ID[type_id].name))
    return BitPlan(ratio=ratio, groups=tuple(groups), predicted_error=expected_error)


def bit_plan(section: SectionBasis, ratio: float) -> BitPlan:
    """The section's plan at a ratio. Raises ArtifactError if it is another codec's."""
    plan = section.plans[ratio]
    if not isinstance(plan, BitPlan):
        raise ArtifactError(f"{type(plan).__name__} is not a plan of version 1")
    return plan


@dataclass(frozen=True)
class Batch:
    """Groups of one plan with the same quantiser and size, neighbours in stored order.

    first: place of the first of them in stored order. starts: their first
    coefficients, ascending.
    """

    quantizer: Quantizer
    size: int
    first: int
    starts: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.starts)

    def packed_bytes(self, tokens: int) -> int:
        """Bytes of one group's packed codes."""
        return packed_size(tokens * self.size, self.quantizer.bits)

    @cached_property
    def columns(self) -> slice | torch.Tensor:
        """Coefficients of the batch, as a slice where they are contiguous."""
        first, last = self.starts[0], self.starts[-1]
        if last - first == (self.count - 1) * self.size:
            return slice(first, last + self.size)
        offsets = torch.tensor(self.starts).unsqueeze(1) + torch.arange(self.size)
        return offsets.flatten()


def _stored_order(group: CoefficientGroup) -> tuple[int, int, int]:
    return REGISTRY[group.type].type_id, group.size, group.start


def batches(plan: BitPlan) -> tuple[Batch, ...]:
    """The plan's groups in stored order, batched by type and size."""
    return plan.batches


def stream_lengths(plan: BitPlan, tokens: int) -> list[int]:
    """Bytes of every stream of the payload of `tokens` rows under `plan`, in order."""
    scales = len(plan.groups) * tokens
    codes: dict[int, int] = {}
    for batch in batches(plan):
        type_id = batch.quantizer.type_id
        codes[type_id] = codes.get(type_id, 0) + batch.count * batch.packed_bytes(tokens)
    return [scales, scales, FP16_BYTES * scales, *codes.values()]


def payload_length(plan: BitPlan, tokens: int) -> int:
    """Bytes of the payload of `tokens` rows under `plan`, before entropy coding."""
    return sum(stream_lengths(plan, tokens))


def encode_payload(coefficients: torch.Tensor, plan: BitPlan) -> list[bytes]:
    """Quantise and pack: float32 [T, rank] -> the streams of the payload.

    rank is at least plan.rank. The concatenation of the streams has
    `payload_length(plan, T)` bytes.
    """
    tokens = coefficients.shape[0]
    scales = torch.empty(
        (2, len(plan.groups), tokens), dtype=torch.float16, device=coefficients.device
    )
    code_streams: dict[int, list[bytes]] = {}
    for batch in batches(plan):
        x = coefficients[:, batch.columns].view(tokens, batch.count, batch.size)
        codes, shift, scale = batch.quantizer.quantize(x)
        scales[0, batch.first : batch.first + batch.count] = shift.T
        scales[1, batch.first : batch.first + batch.count] = scale.T
        packed = pack(codes.transpose(0, 1).flatten(1), batch.quantizer.bits)
        code_streams.setdefault(batch.quantizer.type_id, []).append(to_bytes(packed))
    low, high = scales.view(torch.uint8).view(*scales.shape, FP16_BYTES).unbind(-1)
    scale_streams = [to_bytes(high[0]), to_bytes(high[1]), to_bytes(low)]
    return scale_streams + [b"".join(parts) for parts in code_streams.values()]


def decode_payload(
    payload: bytearray, plan: BitPlan, tokens: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Inverse of `encode_payload`: float32 [T, plan.rank], zero where nothing is stored.

    payload: `payload_length(plan, tokens)` bytes. Raises
    ContainerError("bounds") if a value is not finite, which no encoder writes.
    """
    coefficients = torch.zeros((tokens, plan.rank), device=device)
    if not payload:
        return coefficients
    data = torch.frombuffer(payload, dtype=torch.uint8).to(device)
    half = 2 * len(plan.groups) * tokens
    high_low = torch.stack((data[half : 2 * half], data[:half]), dim=-1)
    scales = high_low.view(torch.float16).view(2, len(plan.groups), tokens)
    offset = 2 * half
    for batch in batches(plan):
        size = batch.packed_bytes(tokens)
        packed = data[offset : offset + batch.count * size].view(batch.count, size)
        offset += batch.count * size
        codes = unpack(packed, batch.quantizer.bits, tokens * batch.size)
        shift, scale = scales[:, batch.first : batch.first + batch.count]
        x = batch.quantizer.dequantize(codes.view(batch.count, tokens, batch.size), shift, scale)
        coefficients[:, batch.columns] = x.transpose(0, 1).flatten(1)
    if not magnitude(coefficients) < math.inf:
        raise ContainerError("bounds", "a decoded coefficient is not finite")
    return coefficients
