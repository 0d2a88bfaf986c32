"""Payloads of the kernels against `payload`: the same bytes, the same coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.entropy import MAX_UNIT_BYTES, DeflateCoder
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup, decode_payload, encode_payload
from tests.codec.kernels.devices import DEVICES

from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads, encode_payloads  # isort: skip
from kvtc_vllm.codec.kernels.resident import PlanTables  # isort: skip

TYPES = ("int2", "int4", "fp8")
SIZES = (1, 3, 16, 40, 64)


@st.composite
def plans(draw):
    groups, start = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start += draw(st.sampled_from((0, 0, 0, 2)))  # a gap: coefficients in no group
        size = draw(st.sampled_from(SIZES))
        groups.append(CoefficientGroup(start, size, draw(st.sampled_from(TYPES))))
        start += size
    return BitPlan(8.0, tuple(groups), 0.0)


def hard_coefficients(rows: int, rank: int, seed: int) -> torch.Tensor:
    """Coefficients of all magnitudes; some rows constant, tiny, huge or exactly on ties.

    Without -0: which of two zeros of different sign is the least is up to the reference's
    vectorised minimum, and decodes to the same.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=generator)
    x *= torch.exp(6 * torch.randn(rows, 1, generator=generator))
    kind = torch.randint(0, 7, (rows,), generator=generator)
    x[kind == 0] = 3.25
    x[kind == 1] *= 1e-7  # scales that are subnormal in float16, or zero
    x[kind == 2] = x[kind == 2].round().clamp(-40, 40) / 2  # ties
    x[kind == 3] = 0.0
    x[kind == 4] *= 1e-42
    return x.clamp(-65504.0, 65504.0) + 0.0


def run_encode(x: torch.Tensor, tables: PlanTables, chunks: int, device: str) -> torch.Tensor:
    out = torch.full((chunks, tables.payload_bytes), 0xA5, dtype=torch.uint8, device=device)
    encode_payloads(x.to(device), tables, out)
    return out.cpu()


def expected_payloads(x: torch.Tensor, plan: BitPlan, chunks: int) -> torch.Tensor:
    payloads = [b"".join(encode_payload(part, plan)) for part in x.chunk(chunks)]
    return torch.stack([torch.frombuffer(bytearray(p), dtype=torch.uint8) for p in payloads])


@pytest.mark.parametrize("device", DEVICES)
@given(plan=plans(), chunks=st.integers(1, 2), tokens=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_payloads_are_those_of_the_reference(device, plan, chunks, tokens, seed):
    x = hard_coefficients(chunks * tokens, plan.rank + 1, seed)
    tables = PlanTables.build(plan, tokens, torch.device(device))
    if not plan.groups:
        assert tables.payload_bytes == 0
        return
    expected = expected_payloads(x, plan, chunks)
    assert torch.equal(run_encode(x, tables, chunks, device), expected)
    out = torch.full((chunks * tokens, plan.rank), 7.0, device=device)
    damaged = torch.zeros(chunks, dtype=torch.int32, device=device)
    decode_payloads(expected.to(device), tables, out, damaged)
    wanted = [decode_payload(bytearray(p.numpy().tobytes()), plan, tokens) for p in expected]
    assert torch.equal(out.cpu(), torch.cat(wanted))
    assert damaged.tolist() == [0] * chunks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type_name", TYPES)
@given(values=st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=17))
@settings(max_examples=60)
def test_any_group_of_one_token(device, type_name, values):
    plan = BitPlan(8.0, (CoefficientGroup(0, len(values), type_name),), 0.0)
    x = torch.tensor([values], dtype=torch.float32) + 0.0
    tables = PlanTables.build(plan, 1, torch.device(device))
    assert torch.equal(run_encode(x, tables, 1, device), expected_payloads(x, plan, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type_name", TYPES)
def test_runs_longer_than_a_tile(device, type_name):
    plan = BitPlan(8.0, (CoefficientGroup(0, 1, "fp8"), CoefficientGroup(1, 1024, type_name)), 0.0)
    x = hard_coefficients(5, 1025, 3)
    tables = PlanTables.build(plan, 5, torch.device(device))
    expected = expected_payloads(x, plan, 1)
    assert torch.equal(run_encode(x, tables, 1, device), expected)
    out = torch.empty(5, 1025, device=device)
    decode_payloads(expected.to(device), tables, out, torch.zeros(1, dtype=torch.int32).to(device))
    assert torch.equal(out.cpu(), decode_payload(bytearray(expected.numpy().tobytes()), plan, 5))


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_of_every_type_is_read(device):
    """All byte values, with shifts and scales of any bits that are finite."""
    groups = tuple(CoefficientGroup(256 * i, 256, name) for i, name in enumerate(TYPES))
    plan = BitPlan(8.0, groups, 0.0)
    tables = PlanTables.build(plan, 4, torch.device(device))
    payload = torch.randint(0, 256, (1, tables.payload_bytes), dtype=torch.uint8)
    payload[0, : 2 * 12] &= 0xBF  # exponents below the largest
    payload[0, -1024:] = torch.arange(1024) % 127
    out = torch.empty(4, plan.rank, device=device)
    damaged = torch.zeros(1, dtype=torch.int32, device=device)
    decode_payloads(payload.to(device), tables, out, damaged)
    assert torch.equal(out.cpu(), decode_payload(bytearray(payload.numpy().tobytes()), plan, 4))
    assert damaged.tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["nan code", "infinite shift", "nan scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_value_that_is_not_finite_marks_its_chunk(device, place, dtype):
    plan = BitPlan(8.0, (CoefficientGroup(0, 16, "fp8"),), 0.0)
    tables = PlanTables.build(plan, 2, torch.device(device))
    payloads = expected_payloads(torch.randn(6, 16), plan, 3)
    at, value = {"nan code": (-1, 0xFF), "infinite shift": (0, 0x7C), "nan scale": (2, 0x7F)}[place]
    payloads[1, at] = value
    if place == "infinite shift":
        payloads[1, 4] = 0
    damaged = torch.zeros(3, dtype=torch.int32, device=device)
    out = torch.empty(6, 16, dtype=dtype, device=device)
    decode_payloads(payloads.to(device), tables, out, damaged)
    assert damaged.tolist() == [0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_float16_coefficients_saturate(device):
    plan = BitPlan(8.0, (CoefficientGroup(0, 2, "int4"),), 0.0)
    tables = PlanTables.build(plan, 1, torch.device(device))
    payload = expected_payloads(torch.tensor([[65504.0, -65504.0]]), plan, 1)
    out = torch.empty(1, 2, dtype=torch.float16, device=device)
    damaged = torch.zeros(1, dtype=torch.int32, device=device)
    decode_payloads(payload.to(device), tables, out, damaged)
    assert out.isfinite().all()
    assert damaged.tolist() == [0]


@given(plan=plans(), tokens=st.integers(1, 3000))
@settings(max_examples=30)
def test_units_are_cut_as_the_cpu_writer_cuts_them(plan, tokens):
    tables = PlanTables.build(plan, tokens, torch.device("cpu"))
    streams = encode_payload(torch.zeros(tokens, plan.rank), plan)
    units = DeflateCoder(level=0).encode(streams).units
    assert list(tables.unit_lengths) == [unit.raw_length for unit in units]
    assert sum(tables.unit_lengths) == tables.payload_bytes
    assert max(tables.unit_lengths, default=0) <= MAX_UNIT_BYTES
