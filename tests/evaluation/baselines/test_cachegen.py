"""CacheGen: lossless coding, error bounds of anchors and deltas, profiles."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.evaluation.baselines.cachegen import CacheGen
from kvtc_vllm.evaluation.baselines.cachegen_codes import (
    ANCHOR_SYMBOLS,
    anchor_count,
    delta_symbols,
    dequantize,
    quantize,
)
from kvtc_vllm.evaluation.baselines.cachegen_profile import (
    CacheGenProfile,
    SymbolCounts,
    probabilities,
)
from kvtc_vllm.evaluation.baselines.entropy import decode_columns, encode_columns, histogram
from kvtc_vllm.evaluation.methods import find
from kvtc_vllm.evaluation.processes import profiles
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    random_cache,
    relative_error,
    structured_cache,
    views,
)

WIDTHS = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5])
"""Bin widths of five layers."""


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    return structured_cache(tokens, seed)[0].flatten(2).float()


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 256])
def test_coding_is_lossless(tokens):
    anchors, deltas = quantize(rows(tokens))
    counts = SymbolCounts.of(anchors, deltas)
    for symbols, table in ((anchors.values, counts.anchors), (deltas.values, counts.deltas)):
        model = probabilities(table)
        coded = encode_columns(symbols.flatten(1), model)
        back = decode_columns(memoryview(coded), model, len(symbols))
        assert torch.equal(back.view(symbols.shape), symbols)


def test_coding_takes_symbols_that_the_distribution_excludes():
    symbols = torch.tensor([[0], [3], [1], [0]])
    excluded = histogram(torch.zeros(5, 1), 4).float().numpy()
    coded = encode_columns(symbols, excluded)
    assert torch.equal(decode_columns(memoryview(coded), excluded, 4), symbols.int())


def test_coding_comes_close_to_the_entropy():
    symbols = torch.randint(0, 3, (4000, 6), generator=torch.Generator().manual_seed(0)) ** 2
    counts = histogram(symbols, 5)
    p = counts / counts.sum(dim=1, keepdim=True)
    bits = -(counts * p.clamp(min=1e-9).log2()).sum()
    assert len(encode_columns(symbols, counts.float().numpy())) * 8 < 1.002 * bits + 64


def test_symbols_stay_in_their_alphabets():
    x = torch.zeros(40, 5, 128)
    x[3, :, 0] = 1e4
    for cache in (x, rows(40)):
        anchors, deltas = quantize(cache)
        for symbols, size in ((anchors, ANCHOR_SYMBOLS), (deltas, delta_symbols(128))):
            assert symbols.values.min() >= 0
            assert symbols.values.max() < size


def test_anchors_are_within_half_of_255_steps_and_deltas_within_half_a_bin():
    x = rows(101)
    anchors, deltas = quantize(x)
    assert len(anchors.values) == anchor_count(101) == 11
    back = dequantize(anchors, deltas)
    error = (back - x).abs()
    anchor_bound = x[::10].abs().amax(dim=-1, keepdim=True) / 254
    assert (error[::10] <= anchor_bound * 1.2).all()
    # By hand: the sixth token of the third group.
    delta = x[25] - back[20]
    bin_width = WIDTHS * delta.square().mean(dim=-1).sqrt()
    assert (error[25] <= bin_width[:, None] * 0.502).all()


def test_profile_is_saved_loaded_and_added(tmp_path):
    profile = CacheGenProfile.fit(*structured_cache(200)) + CacheGenProfile.fit(
        *structured_cache(300, seed=1)
    )
    profile.save(tmp_path / "profile.safetensors")
    loaded = CacheGenProfile.load(tmp_path / "profile.safetensors")
    for kind, counts in profile.counts.items():
        assert torch.equal(loaded.counts[kind].anchors, counts.anchors)
        assert torch.equal(loaded.counts[kind].deltas, counts.deltas)
        assert (counts.anchors.sum(dim=-1) == 50).all()
        assert (counts.deltas.sum(dim=-1) == 450).all()
    keys = 5 * 128 * (255 + delta_symbols(128)) * 4
    values = 5 * 64 * (255 + delta_symbols(64)) * 4
    assert loaded.nbytes() == keys + values


def test_profile_is_not_charged_and_changes_no_value(tmp_path):
    profile = CacheGenProfile.fit(*structured_cache(2000, seed=1))
    k, v = structured_cache(256, seed=2)
    plain = CacheGen(GEOMETRY, torch.bfloat16)
    profiled = CacheGen(GEOMETRY, torch.bfloat16, profile=profile)
    parts, profiled_parts = plain.compress(k, v, START), profiled.compress(k, v, START)
    assert sum(map(len, profiled_parts)) < sum(map(len, parts))
    path = tmp_path / "profile.safetensors"
    profile.save(path)
    second = CacheGen(GEOMETRY, torch.bfloat16, profile=str(path))
    restored = second.restore(views(profiled_parts), 256, START)
    for a, b in zip(restored, plain.restore(views(parts), 256, START), strict=True):
        assert torch.equal(a, b)


def test_a_profile_is_counted_with_the_bins_it_is_used_with(tmp_path, monkeypatch):
    """Other bins make another alphabet: each setting has a file of its own."""
    made = []

    def count(model, path, bins, texts):
        made.append(bins)
        CacheGenProfile.fit(*structured_cache(100), bins).save(path)

    monkeypatch.setattr(profiles, "cachegen_profile", count)
    k, v = structured_cache(100, seed=2)
    for name in ("cachegen", "cachegen/bins=0.5", "cachegen/bins=0.5"):
        override = profiles.with_profile(find(name), "model", tmp_path).override
        options = {**override["options"], **override.get("settings", {})}
        method = CacheGen(GEOMETRY, torch.bfloat16, **options)
        restored = method.restore(views(method.compress(k, v, START)), 100, START)
        assert relative_error(restored[0], k) < 0.2
    assert made == [1.0, 0.5]


def test_a_profile_of_other_data_still_restores():
    profile = CacheGenProfile.fit(*random_cache(50, torch.bfloat16))
    k, v = structured_cache(100)
    method = CacheGen(GEOMETRY, torch.bfloat16, profile=profile)
    for back, original in zip(
        method.restore(views(method.compress(k, v, START)), 100, START), (k, v), strict=True
    ):
        assert relative_error(back, original) < 0.2


def test_scales_are_charged():
    parts = CacheGen(GEOMETRY, torch.bfloat16).compress(*structured_cache(95), START)
    key_counts, key_parts = parts[:2], parts[2:6]
    assert [len(x) for x in key_parts[::2]] == [10 * 5 * 2, 85 * 5 * 2]
    assert all(key_counts)
