"""Payloads of step plans by kernels against `v2`: the same bytes, the same coefficients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry, RankArtifact, SectionBasis
from kvtc_vllm.codec.entropy import cut_units
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.codec.kernels.devices import DEVICES, Counted

from kvtc_vllm.codec.kernels import (  # isort: skip
    step_decoding,
    step_encoder,
    step_encoding,
    step_payloads,
)
from kvtc_vllm.codec.kernels.chunks import RowLayout  # isort: skip
from kvtc_vllm.codec.kernels.numeric import products  # isort: skip
from kvtc_vllm.codec.kernels.payload_coding import (  # isort: skip
    NO_MARKS,
    RawPayloads,
    StepPayloads,
    StoredPayloads,
)
from kvtc_vllm.codec.kernels.step_decoding import UNEVEN  # isort: skip
from kvtc_vllm.codec.kernels.step_payloads import StepPlanPayloads  # isort: skip
from kvtc_vllm.codec.kernels.step_tables import unit_of  # isort: skip
from kvtc_vllm.codec.kernels.unit_cuts import cut_streams  # isort: skip

RULE = SinkRule((0,), 0.0, 0.5)
MANY = [2] * 70 + [4, 8] * 3, [2, 4, 2], [8, 2, 4]
"""Widths of the columns of K, of what is beyond them, and of V."""
FEW = [2, 2, 8, 2], [2], [4]


def plan_of(widths: list[int], step: float, beyond: StepPlan | None = None) -> StepPlan:
    """A plan whose columns have these widths, in classes of their own values and rounding."""
    kinds = torch.tensor([2, 4, 8], dtype=torch.uint8)
    classes = torch.tensor([[2, 4, 8].index(width) for width in widths], dtype=torch.uint8)
    values = step * (torch.arange(1, 6) + torch.tensor([[-0.1], [0.05], [0.0]]))
    rounding = torch.tensor([[0.7, 0.4], [0.6, 0.45], [0.5, 0.5]])
    return StepPlan(step, classes, kinds, values, rounding, 7.5, 1e4, 0.0, beyond)


def coding_of(
    device: str,
    step: float = 0.1,
    operand: torch.dtype = torch.float32,
    widths=MANY,
    paired: bool = False,
    rule: SinkRule | None = RULE,
    alike: bool = False,
):
    """Bases are unit vectors: rows begin with coefficients, of K beyond the plan's, too.

    paired: what K has without it are the rows of a pair. alike: rows of V are as long as those of
    K, so that they share products.
    """
    of_k, beyond, of_v = widths
    first = plan_of(of_k, step, plan_of(beyond, step))
    plans = {(0, "kv"): first} if paired else {(0, "k"): first, (0, "v"): plan_of(of_v, step)}
    sections = {}
    size = first.total_rank
    for key, plan in plans.items():
        row = size if alike else plan.total_rank
        basis = torch.eye(row, plan.total_rank, dtype=torch.float16)
        sections[key] = SectionBasis(torch.zeros(row), basis, {8.0: plan})
    sizes = (size - size // 3, size // 3) if paired else (size, size if alike else len(of_v))
    geometry = Geometry(1, 1, *sizes, ((0, 1),))
    artifact = RankArtifact(
        geometry, sections, (), (None,), bytes(16), codec="kvtc2", sink_rule=rule
    )
    return StepPlanPayloads(artifact, 8.0, torch.device(device), operand)


def hard_rows(coding: StepPlanPayloads, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Levels of all sizes: zeros, ties of the dead zone, escapes of every width and wide ones.

    By the names of the sections.
    """
    drawn = torch.Generator().manual_seed(seed)
    rows = {}
    for (_, kind), plan in coding.plans.items():
        shape = tokens, plan.total_rank
        x = torch.randn(shape, generator=drawn) * plan.step
        x *= 10 ** (5 * torch.rand(shape, generator=drawn).square() - 1)
        x[torch.rand(shape, generator=drawn) < 0.2] = 0
        rows[kind] = x.clamp(-4000 * plan.step, 4000 * plan.step)
    return rows


def marks_of(layout: RowLayout, seed: int) -> list[np.ndarray]:
    drawn = np.random.default_rng(seed)
    return [drawn.random(tokens) < 0.3 for tokens in layout.tokens]


def streams_of(plan: StepPlan, x: torch.Tensor) -> list[bytes]:
    return encode_codes(plan.quantise(x), plan.packed)


def expected_streams(coding, layout, rows, marks) -> list[list[bytes]]:
    """Of every section of every chunk, chunk after chunk."""
    found = []
    for place, own in enumerate(marks):
        part = slice(layout.first_rows[place], layout.first_rows[place + 1])
        for (_, kind), plan in coding.plans.items():
            x = rows[kind][part].clone()
            x[own] *= plan.sink_gain
            found.append(streams_of(plan, x))
            beyond = [] if plan.beyond is None or not own.any() else x[own][:, plan.rank :]
            found.append([] if isinstance(beyond, list) else streams_of(plan.beyond, beyond))
    return found


def payloads_of(raw: RawPayloads) -> list[bytes]:
    """Of every section, chunk after chunk."""
    data = raw.data.cpu().numpy()
    units = [
        data[first : first + size].tobytes()
        for first, size in zip(raw.starts, raw.lengths, strict=True)
    ]
    ends = raw.units.ravel().cumsum()
    return [
        b"".join(units[end - count : end])
        for end, count in zip(ends, raw.units.ravel(), strict=True)
    ]


def encode(coding, layout, rows, marks) -> RawPayloads:
    resident = coding.resident
    there = torch.zeros(layout.num_rows, resident.row, device=resident.device)
    for key, columns in resident.columns.items():
        own = rows[key[1]].to(resident.device)
        there[:, columns][:, : own.shape[1]] = own
    return coding.encode(layout, there, dict(zip(layout.members, marks, strict=True)))


def decode(coding, layout, payloads, marks) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Rows, and the flags of the chunks."""
    device = coding.resident.device
    per_chunk = len(coding.tables.sections)
    stored = [
        StoredPayloads(
            0, np.array([*map(len, payloads[i * per_chunk : (i + 1) * per_chunk])], np.int64), own
        )
        for i, own in enumerate(marks)
    ]
    plan = coding.plan(layout, stored)
    data = torch.full((plan.nbytes,), 0xA5, dtype=torch.uint8)
    there = [payload for payload in payloads if payload]
    for place, payload in zip(plan.placed.places.tolist(), there, strict=True):
        data[place : place + len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    flags = torch.zeros(len(layout.members), dtype=torch.int32, device=device)
    longest = max(layout.tokens)
    step = StepPayloads(
        layout,
        layout.table.to(device),
        torch.from_numpy(plan.numbers).to(device),
        data.to(device),
        flags,
        coding.memory(len(layout.members), longest, device),
        plan.marked,
    )
    room = torch.full((coding.coefficients(layout.num_rows, plan.marked),), float("nan"))
    room = room.to(device, coding.resident.operand)
    tokens, resident = layout.num_rows, coding.resident
    out = torch.full((tokens + plan.marked, resident.row), float("nan"), device=device)
    coding.decode(step, room, out)
    others = coding.others(step)
    if others is not None:
        marked = others > 0
        out[:tokens][marked] = out[tokens - 1 + others[marked]]
    found = {
        key[1]: out[:tokens, resident.columns[key]][:, : plan.total_rank].cpu()
        for key, plan in coding.plans.items()
    }
    return found, flags.tolist()


def restored(coding, layout, rows, marks) -> dict[str, torch.Tensor]:
    """What the reference makes of rows and their payloads."""
    found = {}
    for (_, kind), plan in coding.plans.items():
        out = torch.zeros_like(rows[kind])
        for place, own in enumerate(marks):
            part = slice(layout.first_rows[place], layout.first_rows[place + 1])
            x = rows[kind][part].clone()
            x[own] *= plan.sink_gain
            y = torch.zeros_like(x)
            y[:, : plan.rank] = plan.restore(plan.quantise(x))
            if plan.beyond is not None and own.any():
                y[own, plan.rank :] = plan.beyond.restore(plan.beyond.quantise(x[own, plan.rank :]))
            y[own] /= plan.sink_gain
            out[part] = y
        found[kind] = out
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("step", "tokens", "rows_are"),
    [
        (0.1, [35, 0, 3], "apart"),
        (2.0**-20, [5], "apart"),
        (0.1, [5, 3], "paired"),
        (0.1, [5, 3], "alike"),
    ],
)
def test_payloads_are_those_of_the_reference(
    device: str, step: float, tokens: list[int], rows_are: str
) -> None:
    """Chunks of several lengths, one without marks; steps that float16 holds and others; sections
    that share products, filled up with zeros."""
    coding = coding_of(device, step, paired=rows_are == "paired", alike=rows_are == "alike")
    if rows_are == "alike":
        (batch,) = coding.resident.batches
        assert [order.width for order in coding.resident.orders.values()] == [batch.shape.width] * 2
        assert sum(len(table.columns.sources) for table in coding.tables.sections) == len(
            coding.tables.known
        )
    layout = RowLayout.of(tokens)
    rows, marks = hard_rows(coding, layout.num_rows, 1), marks_of(layout, 2)
    marks[-1][:] = False
    raw = encode(coding, layout, rows, marks)
    expected = expected_streams(coding, layout, rows, marks)
    assert payloads_of(raw) == [b"".join(streams) for streams in expected]
    cut = [size for streams in expected for size in cut_units(map(len, streams))]
    assert raw.lengths.tolist() == cut
    assert raw.left_out == ()
    largest = raw.magnitudes.cpu().view(torch.float32)
    assert ((largest > 0) & (largest < 32767)).all()
    found, flags = decode(coding, layout, payloads_of(raw), marks)
    assert flags == [0] * len(layout.members)
    for kind, wanted in restored(coding, layout, rows, marks).items():
        assert torch.equal(found[kind], wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_sink_rule_there_are_no_marks(device: str) -> None:
    coding = coding_of(device, widths=FEW, rule=None)
    layout = RowLayout.of([3, 2])
    rows = hard_rows(coding, 5, 7)
    raw = encode(coding, layout, rows, [NO_MARKS] * 2)
    expected = [
        b"".join(streams_of(plan, rows[kind][part]))
        for part in (slice(0, 3), slice(3, 5))
        for (_, kind), plan in coding.plans.items()
    ]
    assert payloads_of(raw) == expected
    found, flags = decode(coding, layout, expected, [NO_MARKS] * 2)
    assert flags == [0, 0]
    unmarked = [np.zeros(tokens, np.bool_) for tokens in layout.tokens]
    for kind, wanted in restored(coding, layout, rows, unmarked).items():
        assert torch.equal(found[kind], wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_a_chunk_whose_escapes_find_no_room_comes_later(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = coding_of(device, widths=FEW)
    layout = RowLayout.of([4, 4])
    rows, marks = hard_rows(coding, 8, 3), marks_of(layout, 4)
    for x in rows.values():
        # The first chunk needs all that there is, the second a little.
        x[:4], x[4:] = 900 * 0.1, 0.0
    rows["k"][5, 0] = 1.0
    monkeypatch.setattr(step_encoder, "_POOL_SHARE", 0.0)
    marks[0][:], marks[1][:] = True, False
    raw = encode(coding, layout, rows, marks)
    # In which order they ask for room is left to the device.
    assert raw.left_out
    assert sorted((*raw.layout.members, *raw.left_out)) == [0, 1]
    expected = [b"".join(s) for s in expected_streams(coding, layout, rows, marks)]
    count = len(coding.tables.sections)
    by_chunk = expected[:count], expected[count:]
    assert payloads_of(raw) == [own for member in raw.layout.members for own in by_chunk[member]]
    for place in raw.left_out:
        alone = {kind: x[4 * place : 4 * place + 4] for kind, x in rows.items()}
        raw = encode(coding, layout.part(slice(place, place + 1)), alone, [marks[place]])
        assert raw.left_out == ()
        assert payloads_of(raw) == by_chunk[place]


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_coefficient_is_told(device: str) -> None:
    """In steps; infinite only if it is, so that both refusals are told apart."""
    values = [float("nan"), float("inf"), 3e38, 4000.0, 3276.7, 3276.5]
    coding = coding_of(device, widths=FEW)
    layout = RowLayout.of([2] * len(values))
    rows = {kind: x.clamp(-0.2, 0.2) for kind, x in hard_rows(coding, 12, 5).items()}
    rows["v"][1::2, 0] = torch.tensor(values)
    raw = encode(coding, layout, rows, [np.zeros(2, np.bool_)] * len(values))
    found = raw.magnitudes.cpu().view(torch.float32)
    assert (found < float("inf")).tolist() == [False, False, True, True, True, True]
    assert (found < 32767).tolist() == [False] * 5 + [True]


def damages(payload: bytes) -> list[bytes]:
    """Of a payload of K of four tokens: its escapes do not come out even any more."""
    packed = bytearray(payload)
    packed[0] |= 3
    return [
        payload[:-1],
        payload + b"\0",
        payload[:7],
        bytes(packed),
        b"\xff" * len(payload),
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_uneven_escapes_are_told_and_read_nothing_outside(device: str) -> None:
    coding = coding_of(device, widths=FEW)
    rows = hard_rows(coding, 4, 6)
    rows["k"][:, 0] = 0.0
    rows["k"][:, 2] = 90.0
    none = np.zeros(4, np.bool_)
    own = payloads_of(encode(coding, RowLayout.of([4]), rows, [none]))
    bad = damages(own[0])
    layout = RowLayout.of([4] * (2 + len(bad)))
    payloads = [part for first in (own[0], *bad, own[0]) for part in (first, *own[1:])]
    found, flags = decode(coding, layout, payloads, [none] * len(layout.tokens))
    assert flags == [0, *[UNEVEN] * len(bad), 0]
    assert coding.failures[UNEVEN] == "bounds: escapes do not end where the payload does"
    for kind, wanted in restored(coding, RowLayout.of([4]), rows, [none]).items():
        assert torch.equal(found[kind][:4], wanted)
        assert torch.equal(found[kind][-4:], wanted)


def test_sections_share_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for module, own in (
        (step_encoding, ("_encode_kernel", "_take_kernel")),
        (step_decoding, ("_count_kernel", "_place_kernel", "_unpack_kernel")),
    ):
        for name in own:
            monkeypatch.setattr(module, name, Counted(names, name, getattr(module, name)))

    def counted(*matrices: torch.Tensor) -> torch.Tensor:
        names.append("products")
        return products(*matrices)

    monkeypatch.setattr(step_encoder, "products", counted)
    monkeypatch.setattr(step_payloads, "products", counted)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    coding = coding_of(device, widths=FEW, alike=True)
    assert len(coding.tables.sections) == 4
    layout = RowLayout.of([2])
    rows, marks = hard_rows(coding, 2, 8), [np.array([True, False])]
    payloads = payloads_of(encode(coding, layout, rows, marks))
    assert names == [*["products"] * 2, "_encode_kernel", "_take_kernel", "_encode_kernel"]
    names.clear()
    decode(coding, layout, payloads, marks)
    assert names == [*("_count_kernel", "_place_kernel") * 2, "_unpack_kernel", *["products"] * 2]


def test_a_step_has_room_for_whatever_one_chunk_may_have() -> None:
    coding = coding_of("cpu")
    for chunks, tokens in ((1, 1), (1, 40), (3, 17)):
        most = sum(s.plan.most_raw_length(tokens) for s in coding.tables.sections if s.plan)
        assert coding.payload_room(chunks, tokens) >= most
        assert coding.marked_room(chunks, tokens) >= tokens


def test_steps_that_float16_does_not_hold_get_another_unit() -> None:
    for step in (1e-29, 2.0**-20, 1.0, 3000.0, 1e29):
        unit = unit_of(plan_of([2], step))
        assert 0.5 <= step * unit < 1
        assert float(torch.tensor(unit).frexp().mantissa) == 0.5
    assert unit_of(plan_of([2], 0.1)) == 1
    coding = coding_of("cpu", 3000.0, torch.float16)
    assert coding.tables.values.max() < 6
    plan = plan_of([2], 0.1)
    wild = replace(plan, values=plan.values * 1e6)
    section = SectionBasis(torch.zeros(1), torch.eye(1).half(), {8.0: wild})
    artifact = RankArtifact(
        Geometry(1, 1, 1, 1, ((0, 1),)),
        {(0, "k"): section, (0, "v"): section},
        (),
        (None,),
        bytes(16),
        codec="kvtc2",
    )
    with pytest.raises(ArtifactError, match="float16"):
        StepPlanPayloads(artifact, 8.0, torch.device("cpu"), torch.float16)


def test_units_are_cut_as_the_cpu_writer_cuts_them() -> None:
    lengths = np.array([0, 1, 8191, 12288, 12289, 20480, 65537, 1 << 20], np.int64)
    begins = lengths.cumsum() - lengths
    starts, sizes, counts = cut_streams(begins, lengths)
    assert sizes.tolist() == list(cut_units(lengths.tolist()))
    assert counts.tolist() == [len(list(cut_units([length]))) for length in lengths.tolist()]
    assert starts.tolist() == (sizes.cumsum() - sizes).tolist()
