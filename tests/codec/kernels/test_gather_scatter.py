"""Cache <-> rows against `transform` and plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import keys_from_rows, rows_from_keys, to_cache
from tests.codec.kernels.devices import DEVICES, Counted
from tests.codec.kernels.paged_caches import LAYOUTS, paged_cache, read_slots, rows_of
from tests.codec.synthetic import rope_table

from kvtc_vllm.codec.kernels.paged import (  # isort: skip
    SKIP,
    PagedTensor,
    block_slots,
    chunk_slots,
)
from kvtc_vllm.codec.kernels import paged_io  # isort: skip
from kvtc_vllm.codec.kernels.paged_io import gather_rows, scatter_rows  # isort: skip
from kvtc_vllm.codec.kernels.row_table import LayerPlace, RowTable  # isort: skip

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, *FP8]
HEADS, HEAD_SIZE, HEAD_SIZE_V, PAGES, PAGE_TOKENS = 3, 12, 10, 5, 4
SLOTS = st.integers(0, PAGES * PAGE_TOKENS - 1)


def scaled_rope(rotary_dim: int, neox: bool, dtype: torch.dtype) -> Rope:
    """A table whose cos^2 + sin^2 is not 1, as YaRN's."""
    return Rope((rope_table(rotary_dim, 64, torch.float64) * 1.2).to(dtype), neox)


@st.composite
def caches(draw):
    ropes = draw(
        st.lists(
            st.sampled_from(
                [
                    None,
                    scaled_rope(12, True, torch.bfloat16),
                    scaled_rope(12, False, torch.float32),
                    scaled_rope(4, True, torch.float16),
                ]
            ),
            min_size=1,
            max_size=3,
        )
    )
    return (
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(DTYPES)),
        ropes,
        draw(
            st.lists(st.integers(0, PAGES * PAGE_TOKENS - 1), min_size=1, max_size=6, unique=True)
        ),
        draw(st.integers(0, 50)),
        draw(st.booleans()),
    )


def build(case, device):
    """Cache, slots, positions, ropes, and a scale a layer that the cache's keys have, or None."""
    layout, dtype, ropes, slots, start, scaled = case
    sizes = (len(ropes), PAGES, HEADS, PAGE_TOKENS, HEAD_SIZE, HEAD_SIZE_V)
    cache = paged_cache(layout, *sizes, dtype, device)
    scales = 0.037 * torch.arange(1, len(ropes) + 1) if scaled else None
    if scales is not None:
        cache = cache.scaled({"k": scales, "v": torch.ones(len(ropes))})
        scales = scales[:, None, None]
    positions = torch.arange(start, start + len(slots))
    return cache, torch.tensor(slots), positions, ropes, scales


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("device", DEVICES)
@given(case=caches(), with_mean=st.booleans())
@settings(max_examples=25)
def test_gathered_rows_are_the_reference_rows(device, case, with_mean):
    cache, slots, positions, ropes, scales = build(case, device)
    table = rows_of(cache, "k", ropes)
    mean = torch.linspace(-2, 2, len(ropes) * HEADS * HEAD_SIZE) if with_mean else None
    out = torch.full((len(slots), len(ropes) * HEADS * HEAD_SIZE), 7.0, device=device)
    gather_rows(
        table,
        slots.to(device),
        positions.to(device),
        None if mean is None else mean.to(device),
        out,
    )
    keys = read_slots(cache.k, slots.to(device)).cpu().float()
    expected = rows_from_keys(keys if scales is None else keys * scales, ropes, positions)
    assert torch.equal(out.cpu(), expected if mean is None else expected - mean)


@pytest.mark.parametrize("device", DEVICES)
@given(case=caches(), with_mean=st.booleans(), wanted=st.integers(0, 63))
@settings(max_examples=25)
def test_scattered_rows_are_the_reference_keys(device, case, with_mean, wanted):
    cache, slots, positions, ropes, scales = build(case, device)
    table = rows_of(cache, "k", ropes)
    skipped = torch.tensor([not wanted >> i & 1 for i in range(len(slots))])
    rows = torch.randn(len(slots), len(ropes) * HEADS * HEAD_SIZE) * 3
    mean = torch.linspace(-2, 2, rows.shape[1]) if with_mean else None
    everything = torch.arange(PAGES * PAGE_TOKENS)
    expected = read_slots(cache.k, everything.to(device)).cpu()
    keys = keys_from_rows(rows if mean is None else rows + mean, ropes, positions, HEADS)
    expected[slots[~skipped]] = to_cache(keys, scales, expected.dtype)[~skipped]
    values = read_slots(cache.v, everything.to(device)).cpu()
    scatter_rows(
        table,
        slots.masked_fill(skipped, SKIP).to(device),
        positions.to(device),
        None if mean is None else mean.to(device),
        rows.to(device),
    )
    assert same_bits(read_slots(cache.k, everything.to(device)), expected)
    assert same_bits(read_slots(cache.v, everything.to(device)), values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_bit_for_bit_through_rows(device, dtype):
    cache = paged_cache("NHD", 2, PAGES, HEADS, PAGE_TOKENS, HEAD_SIZE, HEAD_SIZE_V, dtype, device)
    slots = torch.tensor([3, 17, 4], device=device)
    before = read_slots(cache.v, slots).clone()
    plain = rows_of(cache, "v", [None, None])
    rows = torch.empty(3, 2 * HEADS * HEAD_SIZE_V, device=device)
    gather_rows(plain, slots, slots, None, rows)
    assert same_bits(rows.to(dtype).view_as(before), before)
    for view in cache.v.views:
        view.zero_()
    scatter_rows(plain, slots, slots, None, rows)
    assert same_bits(read_slots(cache.v, slots), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FP8)
def test_every_code_of_fp8_is_read_and_written_exactly(device, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    cache = paged_cache("NHD", 1, 1, 1, 1, 256, 1, dtype, device)
    cache.k.views[0].view(torch.uint8).copy_(codes.view(torch.uint8).view(1, 1, 1, 256))
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    plain = rows_of(cache, "k", [None])
    rows = torch.empty(1, 256, device=device)
    gather_rows(plain, slots, slots, None, rows)
    assert torch.equal(rows.cpu()[0].nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))
    cache.k.views[0].zero_()
    scatter_rows(plain, slots, slots, None, rows)
    found = read_slots(cache.k, slots).flatten().cpu()
    limit = torch.finfo(dtype).max
    finite = codes.float().isfinite()
    assert same_bits(found[finite], codes[finite])
    # The sign of what is no number is anybody's: a GPU drops it on the way through float32.
    others = codes[~finite].float()
    assert torch.equal(found[~finite].float().isnan(), others.isnan())
    infinite = others.isinf()
    assert same_bits(found[~finite][infinite], others[infinite].clamp(-limit, limit).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FP8)
def test_fp8_rounds_as_on_the_cpu(device, dtype):
    """Every code's value, the ties between neighbours and what is next to them, both signs."""
    codes = torch.arange(127, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()]
    ties = (codes[1:] + codes[:-1]) / 2
    points = torch.cat((codes, ties, codes[-1:] * 1.06, codes[-1:] * 3))
    near = [points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(1e9))]
    values = torch.cat((*near, *(-x for x in near)))
    cache = paged_cache("NHD", 1, 1, 1, 1, len(values), 1, dtype, device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    plain = rows_of(cache, "k", [None])
    scatter_rows(plain, slots, slots, None, values[None].to(device))
    limit = torch.finfo(dtype).max
    assert same_bits(read_slots(cache.k, slots).flatten(), values.clamp(-limit, limit).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_layers_of_the_table_are_written(device):
    cache = paged_cache("HND", 3, PAGES, HEADS, PAGE_TOKENS, HEAD_SIZE, 10, torch.float32, device)
    rope = scaled_rope(HEAD_SIZE, True, torch.float32)
    before = [view.clone() for view in cache.k.views]
    slots = torch.tensor([6], device=device)
    rows = torch.randn(1, HEADS * HEAD_SIZE, device=device)
    scatter_rows(rows_of(cache, "k", [rope], 1), slots, slots, None, rows)
    assert torch.equal(cache.k.views[0], before[0])
    assert torch.equal(cache.k.views[2], before[2])
    expected = rope.apply(rows.cpu().view(1, HEADS, HEAD_SIZE), slots.cpu())
    assert torch.equal(read_slots(cache.k, slots)[:, 1].cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_round_as_on_the_cpu(device, dtype):
    """Ties, subnormals, -0, overflow: what has few exponents saturates, bfloat16 overflows."""
    values = [0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 70000.0, -1e6, 3.4e38, 1e-40, -3e-8, 6e-8]
    rows = torch.tensor([values], dtype=torch.float32)
    cache = paged_cache("NHD", 1, 1, 1, 1, len(values), 1, dtype, device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    plain = rows_of(cache, "k", [None])
    scatter_rows(plain, slots, slots, None, rows.to(device))
    expected = to_cache(rows.view(1, 1, 1, -1), None, dtype)
    assert same_bits(read_slots(cache.k, slots).flatten(), expected.flatten())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_all_layers_of_k_and_v_are_one_launch(device, dtype, monkeypatch):
    """In any order in a row; rotated alike by tables of their own, or not at all."""
    names = []
    for name in ("_gather_kernel", "_scatter_kernel"):
        monkeypatch.setattr(paged_io, name, Counted(names, name, getattr(paged_io, name)))
    ropes = [scaled_rope(8, True, torch.bfloat16), None, scaled_rope(8, True, torch.bfloat16)]
    ropes[2].cos_sin.mul_(0.5)
    layers, size = len(ropes), HEADS * HEAD_SIZE
    shape = layers, PAGES, HEADS, PAGE_TOKENS, HEAD_SIZE, HEAD_SIZE
    scales = {"k": torch.tensor([0.3, 2.0, 0.02]), "v": torch.tensor([0.07, 1.0, 3.0])}
    cache = paged_cache("NHD", *shape, dtype, device).scaled(scales)
    order = [("v", 1), ("k", 2), ("k", 0), ("v", 0), ("v", 2), ("k", 1)]
    places = [
        LayerPlace(kind, layer, ropes[layer] if kind == "k" else None, i * size)
        for i, (kind, layer) in enumerate(order)
    ]
    table = RowTable.of(cache, places, len(order) * size)
    slots, positions = torch.tensor([3, 17, 4, 9]), torch.arange(30, 34)
    mean = torch.linspace(-1, 1, table.width)
    rows = torch.empty(4, table.width, device=device)
    here = slots.to(device), positions.to(device), mean.to(device)
    gather_rows(table, *here, rows)
    assert names == ["_gather_kernel"]
    for i, (kind, layer) in enumerate(order):
        columns = slice(i * size, (i + 1) * size)
        stored = read_slots(cache.tensor(kind), slots.to(device))[:, layer : layer + 1].cpu()
        x = stored.float() * scales[kind][layer]
        own = ropes[layer] if kind == "k" else None
        assert torch.equal(
            rows[:, columns].cpu(), rows_from_keys(x, [own], positions) - mean[columns]
        )

    # The rows of the second and the last token lie behind those of the others.
    wanted = torch.randn(4, table.width)
    others = torch.tensor([0, 2, 0, 1])
    given = torch.cat((wanted, wanted[[3, 1]]))
    given[1], given[3] = float("nan"), float("inf")
    flags = torch.zeros(4, dtype=torch.int32, device=device)
    scatter_rows(table, *here, given.to(device), flags, others.to(device))
    assert names[1:] == ["_scatter_kernel"]
    assert flags.tolist() == [0] * 4
    for i, (kind, layer) in enumerate(order):
        columns = slice(i * size, (i + 1) * size)
        x = wanted[:, columns] + mean[columns]
        own = ropes[layer] if kind == "k" else None
        expected = keys_from_rows(x, [own], positions, HEADS)
        expected = to_cache(expected, scales[kind][layer].view(1, 1, 1), dtype)
        found = read_slots(cache.tensor(kind), slots.to(device))[:, layer : layer + 1]
        assert same_bits(found, expected)


def test_layers_that_kernels_are_compiled_apart_for_are_parted():
    """V of another head size; keys that are rotated in another way. None is left out."""
    ropes = [
        scaled_rope(12, True, torch.float32),
        None,
        scaled_rope(4, True, torch.float32),
        scaled_rope(12, False, torch.float32),
        scaled_rope(12, True, torch.float16),
        scaled_rope(12, True, torch.float32),
    ]
    cache = paged_cache("NHD", len(ropes), PAGES, HEADS, 4, HEAD_SIZE, 10, torch.float16, "cpu")
    places = [
        LayerPlace(kind, layer, rope if kind == "k" else None, 0)
        for kind in ("k", "v")
        for layer, rope in enumerate(ropes)
    ]
    parts = RowTable.of(cache, places, 1).parts
    assert sorted(len(part) for part in parts) == [1, 1, 2, 2, 6]
    addresses = [row[0] for part in parts for row in part.table.tolist()]
    views = [*cache.k.views, *cache.v.views]
    assert sorted(addresses) == sorted(view.data_ptr() for view in views)


def test_layers_that_are_not_alike_are_refused():
    with pytest.raises(ValueError, match="layer 1"):
        PagedTensor.of([torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8, dtype=torch.float16)])


def test_block_slots():
    assert block_slots([5, 0], 3).tolist() == [15, 16, 17, 0, 1, 2]


def test_slots_of_chunks():
    found = chunk_slots([[5, 0], [7], [], [2, 1, 3]], [0, 1, 0, 0], 2, 6)
    assert found.tolist() == [
        [10, 11, 0, 1, SKIP, SKIP],
        [SKIP, SKIP, 14, 15, SKIP, SKIP],
        [SKIP] * 6,
        [4, 5, 2, 3, 6, 7],
    ]
    assert chunk_slots([], [], 2, 0).shape == (0, 0)
