"""Section payloads: lengths, stored order, and batching that changes nothing."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.packing import pack
from kvtc_vllm.codec.payload import (
    BitPlan,
    CoefficientGroup,
    batches,
    decode_payload,
    encode_payload,
    payload_length,
)
from kvtc_vllm.codec.quantizers import REGISTRY
from kvtc_vllm.codec.shuffle import shuffle, unshuffle

# Sizes and types out of order, a gap at 3..5 and at 54..59, several groups in one batch.
GROUPS = (
    CoefficientGroup(0, 1, "int2"),
    CoefficientGroup(1, 1, "fp8"),
    CoefficientGroup(2, 1, "int2"),
    CoefficientGroup(6, 16, "int4"),
    CoefficientGroup(22, 16, "int2"),
    CoefficientGroup(38, 16, "int4"),
    CoefficientGroup(60, 5, "fp8"),
)
PLAN = BitPlan(ratio=8.0, groups=GROUPS, predicted_error=0.0)
EMPTY = BitPlan(ratio=64.0, groups=(), predicted_error=1.0)
TOKENS = [1, 2, 3, 7, 128]


def coefficients(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 70, generator=torch.Generator().manual_seed(tokens))


def group_by_group(x: torch.Tensor) -> list[bytes]:
    """The layout of FORMAT.md, written with no batching at all."""
    order = sorted(GROUPS, key=lambda g: (REGISTRY[g.type].type_id, g.size, g.start))
    shifts, scales, codes = [], [], {"int2": b"", "int4": b"", "fp8": b""}
    for group in order:
        quantizer = REGISTRY[group.type]
        code, shift, scale = quantizer.quantize(x[:, group.start : group.start + group.size])
        shifts.append(shift)
        scales.append(scale)
        codes[group.type] += bytes(pack(code.flatten(), quantizer.bits).tolist())
    shift_bytes = b"".join(s.numpy().tobytes() for s in shifts)
    scale_bytes = b"".join(s.numpy().tobytes() for s in scales)
    low = shift_bytes[0::2] + scale_bytes[0::2]
    return [shift_bytes[1::2], scale_bytes[1::2], low, *codes.values()]


@pytest.mark.parametrize("tokens", TOKENS)
def test_streams_are_the_format(tokens):
    x = coefficients(tokens)
    assert encode_payload(x, PLAN) == group_by_group(x)


@pytest.mark.parametrize("tokens", TOKENS)
def test_round_trip(tokens):
    x = coefficients(tokens)
    payload = bytearray(b"".join(encode_payload(x, PLAN)))
    assert len(payload) == payload_length(PLAN, tokens)
    restored = decode_payload(payload, PLAN, tokens)
    assert restored.shape == (tokens, PLAN.rank) == (tokens, 65)
    for group in GROUPS:
        columns = slice(group.start, group.start + group.size)
        quantizer = REGISTRY[group.type]
        expected = quantizer.dequantize(*quantizer.quantize(x[:, columns]))
        assert torch.equal(restored[:, columns], expected)
    assert not restored[:, 3:6].any()
    assert not restored[:, 54:60].any()


def test_a_plan_without_groups_stores_nothing():
    streams = encode_payload(torch.zeros(5, 0), EMPTY)
    assert b"".join(streams) == b""
    assert payload_length(EMPTY, 5) == 0
    assert decode_payload(bytearray(), EMPTY, 5).shape == (5, 0)


def test_equal_groups_are_one_batch():
    found = [(b.quantizer.name, b.size, b.first, b.starts) for b in batches(PLAN)]
    assert found == [
        ("int2", 1, 0, (0, 2)),
        ("int2", 16, 2, (22,)),
        ("int4", 16, 3, (6, 38)),
        ("fp8", 1, 5, (1,)),
        ("fp8", 5, 6, (60,)),
    ]


@pytest.mark.parametrize("place", ["shift", "scale", "fp8 code"])
def test_values_that_are_not_finite_are_refused(place):
    payload = bytearray(b"".join(encode_payload(coefficients(3), PLAN)))
    if place == "fp8 code":
        payload[-1] = 0x7F
    else:
        payload[6 * 3 if place == "shift" else 2 * 7 * 3 - 1] = 0x7C
    with pytest.raises(ContainerError) as caught:
        decode_payload(payload, PLAN, 3)
    assert caught.value.reason == "bounds"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_byte_shuffle(dtype):
    x = torch.randn(3, 5).to(dtype)
    streams = shuffle(x)
    assert streams[0][1] == x.view(torch.uint8).flatten()[2 * dtype.itemsize - 1]
    data = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8)
    assert torch.equal(unshuffle(data, dtype).view(3, 5), x)
