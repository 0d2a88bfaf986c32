"""Payloads of the kernels against `payload`: the same bytes, the same coefficients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.entropy import MAX_UNIT_BYTES, DeflateCoder
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup, decode_payload, encode_payload
from tests.codec.kernels.devices import DEVICES, Counted

from kvtc_vllm.codec.kernels import payload_kernels  # isort: skip
from kvtc_vllm.codec.kernels.payload_kernels import decode_payloads, encode_payloads  # isort: skip
from kvtc_vllm.codec.kernels.chunks import RowLayout  # isort: skip
from kvtc_vllm.codec.kernels.bit_tables import Columns, PlanTables  # isort: skip
from kvtc_vllm.codec.kernels.resident import ordered  # isort: skip

TYPES = ("int2", "int4", "fp8")
SIZES = (1, 3, 16, 40, 64, 128)


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


class Kernels:
    """The kernels for one plan and chunks of some lengths."""

    def __init__(self, plan: BitPlan, lengths: tuple[int, ...], device: str) -> None:
        self.columns = Columns.of(plan)
        self.layout = RowLayout.of(lengths)
        self.device = torch.device(device)
        self.tables = PlanTables.build([(plan, self.columns, 0)], self.layout.lengths, self.device)
        self.chunks = self.layout.table.to(device)

    def encode(self, x: torch.Tensor) -> list[bytes]:
        """Payloads of coefficients [R, rank] in the plan's own order of columns."""
        count = len(self.layout.members)
        out = torch.full((count, self.tables.payload_stride), 0xA5, dtype=torch.uint8)
        self.magnitudes = torch.zeros(count, dtype=torch.int32, device=self.device)
        out = out.to(self.device)
        rows = ordered(x, self.columns.sources).to(self.device)
        encode_payloads(rows, self.tables, self.chunks, out, self.magnitudes)
        sizes = [sum(self.tables.payload_bytes[self._which(t)]) for t in self.layout.tokens]
        return [row[:size].cpu().numpy().tobytes() for row, size in zip(out, sizes, strict=True)]

    def decode(
        self, payloads: list[bytes], rank: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Coefficients [R, rank] in the plan's own order, zero where nothing is stored."""
        count = len(payloads)
        stored = torch.full((count, self.tables.payload_stride), 0xA5, dtype=torch.uint8)
        for row, payload in zip(stored, payloads, strict=True):
            row[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        out = torch.full((self.layout.num_rows, self.tables.width), 7.0, dtype=dtype)
        out = out.to(self.device)
        self.damaged = torch.zeros(count, dtype=torch.int32, device=self.device)
        decode_payloads(stored.to(self.device), self.tables, self.chunks, out, self.damaged)
        found = torch.zeros(self.layout.num_rows, rank, dtype=dtype)
        filled = self.columns.sources >= 0
        found[:, self.columns.sources[filled]] = out.cpu()[:, filled]
        assert not out.cpu()[:, ~filled].any(), "a product would read what is between the groups"
        return found

    def _which(self, tokens: int) -> int:
        return self.layout.lengths.index(tokens)


def expected_payloads(x: torch.Tensor, plan: BitPlan, lengths: tuple[int, ...]) -> list[bytes]:
    return [b"".join(encode_payload(part, plan)) for part in x.split(lengths)]


@pytest.mark.parametrize("device", DEVICES)
@given(
    plan=plans(),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
@settings(max_examples=25)
def test_payloads_are_those_of_the_reference(device, plan, lengths, seed):
    x = hard_coefficients(sum(lengths), plan.rank, seed)
    kernels = Kernels(plan, tuple(lengths), device)
    if not plan.groups:
        assert set(kernels.tables.payload_bytes) == {(0,)}
        return
    expected = expected_payloads(x, plan, tuple(lengths))
    assert kernels.encode(x) == expected
    wanted = [
        decode_payload(bytearray(payload), plan, tokens)
        for payload, tokens in zip(expected, lengths, strict=True)
    ]
    assert torch.equal(kernels.decode(expected, plan.rank), torch.cat(wanted))
    assert kernels.damaged.tolist() == [0] * len(lengths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [None, float("inf"), float("nan"), 7e4])
def test_the_largest_coefficient_of_each_chunk_is_told(device, value):
    plan = BitPlan(8.0, (CoefficientGroup(0, 3, "int4"), CoefficientGroup(3, 64, "int2")), 0.0)
    x = hard_coefficients(12, plan.rank, 5)
    if value is not None:
        x[4, 20] = value
    kernels = Kernels(plan, (3, 7, 2), device)
    kernels.encode(x)
    found = kernels.magnitudes.cpu().view(torch.float32)
    wanted = torch.stack([part.abs().max() for part in x.split((3, 7, 2))])
    assert torch.equal(found.nan_to_num(nan=1e9), wanted.nan_to_num(nan=1e9))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type_name", TYPES)
@given(values=st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=17))
@settings(max_examples=60)
def test_any_group_of_one_token(device, type_name, values):
    plan = BitPlan(8.0, (CoefficientGroup(0, len(values), type_name),), 0.0)
    x = torch.tensor([values], dtype=torch.float32) + 0.0
    assert Kernels(plan, (1,), device).encode(x) == expected_payloads(x, plan, (1,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("size", [1000, 1024])
def test_groups_of_many_tiles(device, type_name, size):
    groups = (CoefficientGroup(0, 1, "fp8"), CoefficientGroup(1, size, type_name))
    plan = BitPlan(8.0, groups, 0.0)
    x = hard_coefficients(35, 1 + size, 3)
    kernels = Kernels(plan, (35,), device)
    expected = expected_payloads(x, plan, (35,))
    assert kernels.encode(x) == expected
    wanted = decode_payload(bytearray(expected[0]), plan, 35)
    assert torch.equal(kernels.decode(expected, plan.rank), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_every_code_of_every_type_is_read(device):
    """All byte values, with shifts and scales of any bits that are finite."""
    groups = tuple(CoefficientGroup(256 * i, 256, name) for i, name in enumerate(TYPES))
    plan = BitPlan(8.0, groups, 0.0)
    kernels = Kernels(plan, (4,), device)
    payload = torch.randint(0, 256, kernels.tables.payload_bytes[0][:1], dtype=torch.uint8)
    payload[: 2 * 12] &= 0xBF  # exponents below the largest
    payload[-1024:] = torch.arange(1024) % 127
    stored = payload.numpy().tobytes()
    wanted = decode_payload(bytearray(stored), plan, 4)
    assert torch.equal(kernels.decode([stored], plan.rank), wanted)
    assert kernels.damaged.tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["nan code", "infinite shift", "nan scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [16, 64])
def test_a_value_that_is_not_finite_marks_its_chunk(device, place, dtype, size):
    plan = BitPlan(8.0, (CoefficientGroup(0, size, "fp8"),), 0.0)
    payloads = expected_payloads(torch.randn(6, size), plan, (2, 2, 2))
    damaged = bytearray(payloads[1])
    at, value = {"nan code": (-1, 0xFF), "infinite shift": (0, 0x7C), "nan scale": (2, 0x7F)}[place]
    damaged[at] = value
    if place == "infinite shift":
        damaged[4] = 0
    kernels = Kernels(plan, (2, 2, 2), device)
    kernels.decode([payloads[0], bytes(damaged), payloads[2]], size, dtype)
    assert kernels.damaged.tolist() == [0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_float16_coefficients_saturate(device):
    plan = BitPlan(8.0, (CoefficientGroup(0, 2, "int4"),), 0.0)
    payloads = expected_payloads(torch.tensor([[65504.0, -65504.0]]), plan, (1,))
    kernels = Kernels(plan, (1,), device)
    assert kernels.decode(payloads, 2, torch.float16).isfinite().all()
    assert kernels.damaged.tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
def test_sections_share_their_launches(device, monkeypatch):
    """Columns of the second come first in a row, and are filled up with zeros."""
    names = []
    for name in ("_range_kernel", "_codes_kernel"):
        kernel = Counted(names, name, getattr(payload_kernels, name))
        monkeypatch.setattr(payload_kernels, name, kernel)
    types = [("int4", "fp8"), ("fp8", "int2", "int2")]
    sizes = [(64, 3), (1, 128, 64)]
    both = []
    for own, widths in zip(types, sizes, strict=True):
        starts = [sum(widths[:i]) for i in range(len(widths))]
        groups = map(CoefficientGroup, starts, widths, own)
        both.append(BitPlan(8.0, tuple(groups), 0.0))
    columns = [Columns.of(both[0]), Columns.of(both[1], 384)]
    lengths, firsts = (35, 3), (384, 0)
    layout = RowLayout.of(lengths)
    sections = list(zip(both, columns, firsts, strict=True))
    tables = PlanTables.build(sections, layout.lengths, torch.device(device))
    assert (tables.width, columns[1].width) == (512, 384)
    xs = [hard_coefficients(sum(lengths), plan.rank, i) for i, plan in enumerate(both)]
    rows = torch.cat([ordered(xs[i], columns[i].sources) for i in (1, 0)], dim=1).to(device)
    shape = len(lengths), tables.payload_stride
    payloads = torch.full(shape, 0xA5, dtype=torch.uint8, device=device)
    flags = torch.zeros(len(lengths), dtype=torch.int32, device=device)
    table = layout.table.to(device)
    encode_payloads(rows, tables, table, payloads, flags)
    decoded = torch.full_like(rows, 7.0)
    decode_payloads(payloads, tables, table, decoded, flags.zero_())
    assert names == ["_range_kernel", "_codes_kernel", "_codes_kernel"]
    assert flags.tolist() == [0, 0]
    for plan, own, first, x, start in zip(
        both, columns, firsts, xs, tables.payload_starts, strict=True
    ):
        expected = expected_payloads(x, plan, lengths)
        for row, payload in zip(payloads.cpu(), expected, strict=True):
            assert row[start : start + len(payload)].numpy().tobytes() == payload
        wanted = torch.cat(
            [
                decode_payload(bytearray(payload), plan, tokens)
                for payload, tokens in zip(expected, lengths, strict=True)
            ]
        )
        part = decoded[:, first : first + own.width].cpu()
        assert torch.equal(part, ordered(wanted, own.sources))


@given(plan=plans(), tokens=st.integers(1, 3000))
@settings(max_examples=30)
def test_units_are_cut_as_the_cpu_writer_cuts_them(plan, tokens):
    tables = PlanTables.build([(plan, Columns.of(plan), 0)], (tokens,), torch.device("cpu"))
    streams = encode_payload(torch.zeros(tokens, plan.rank), plan)
    units = DeflateCoder(level=0).encode(streams).units
    (lengths,), (size,) = tables.unit_lengths[0], tables.payload_bytes[0]
    assert list(lengths) == [unit.raw_length for unit in units]
    assert sum(lengths) == size
    assert max(lengths, default=0) <= MAX_UNIT_BYTES


@given(plan=plans())
def test_products_have_rows_of_whole_tiles_and_no_column_that_is_not_read(plan):
    """Tensor cores are twice as fast there, see docs/gpu.md; 727 columns is a real rank."""
    columns = Columns.of(plan)
    assert columns.width % 64 == 0
    read = sorted(columns.sources[columns.sources >= 0].tolist())
    assert read == [c for g in plan.groups for c in range(g.start, g.start + g.size)]
    for group, start in zip(plan.groups, columns.starts, strict=True):
        assert group.size % 64 or start % 64 == 0
        assert columns.sources[start] == group.start
    basis = torch.randn(5, plan.rank)
    laid_out = ordered(basis, columns.sources)
    assert torch.equal(laid_out[:, columns.sources >= 0], basis[:, read])
    assert not laid_out[:, columns.sources < 0].any()
