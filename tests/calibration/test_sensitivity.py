"""Weights of rows from sensitivities, their file, and what a fit makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.acceptance import check_artifact
from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings, estimate_fit
from kvtc_vllm.calibration.sensitivity import (
    LEAST_WEIGHT,
    Sensitivity,
    SensitivitySource,
    load_sensitivity,
    row_weights,
    save_sensitivity,
)
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.writing import Description, write_artifact
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind
from kvtc_vllm.codec.bitplan import budget_bits, plan_bits
from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import bit_plan
from tests.calibration.toy import DATA, DOCS, IDENTITY, LAYERS, RATIOS, SIZE, SIZE_V, toy_rows

SOURCE = SensitivitySource(
    model="c-d",
    texts="e",
    documents=3,
    prefix_tokens=64,
    continuation_tokens=16,
    sink_tokens=4,
    max_len=128,
    heldout_fraction=0.1,
    seed=5,
)
FOUND = Sensitivity(
    keys=(1e-6, 4e-6, 1e-6, 1e-6),
    values=(4e-4, 1e-6, 1e-4, 0.0),
    documents=(0, 2, 3),
    tokens=180,
    source=SOURCE,
)


def fit_weighted(reader: SpoolReader, **settings: object) -> RankFit:
    chosen = FitSettings(simulation_rows=512, sensitivity=FOUND)
    return fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        RATIOS,
        settings=replace(chosen, **settings),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def weighted(reader: SpoolReader) -> RankFit:
    return fit_weighted(reader)


def test_weights_are_roots_of_mean_square_one() -> None:
    weights = FOUND.layer_weights()
    assert weights["k"][1] / weights["k"][0] == pytest.approx(2.0)
    assert weights["v"][0] / weights["v"][2] == pytest.approx(2.0)
    assert weights["v"][0] / weights["k"][1] == pytest.approx(10.0)
    # One that no gradient reached can still be divided by.
    assert float(weights["v"][3]) == pytest.approx(LEAST_WEIGHT)
    assert float(torch.stack(list(weights.values())).square().mean()) == pytest.approx(1, rel=1e-2)


def test_rows_have_the_weights_of_their_layers(reader: SpoolReader) -> None:
    weights = row_weights(torch.tensor([1.0, 2.0, 3.0, 4.0]), reader.geometry, 1, "v")
    each = reader.geometry.num_kv_heads * SIZE_V
    assert weights.tolist() == [3.0] * each + [4.0] * each


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    save_sensitivity(path, FOUND)
    assert load_sensitivity(path, LAYERS) == FOUND
    assert [p.name for p in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": [1.0]}, "keys has 1 numbers, the model has 4 layers"),
        ({"values": [1.0, 1.0, -1.0, 1.0]}, "values has a number that is negative"),
        ({"keys": [0.0] * 4, "values": [0.0] * 4}, "are all 0"),
        ({"version": 2}, "version is 2, this program reads 1"),
        ({"tokens": "x"}, "tokens"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(msgspec.to_builtins(FOUND) | changes))
    with pytest.raises(ArtifactError, match=message) as raised:
        load_sensitivity(path, LAYERS)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--sensitivity gradient --spool DIR leaves"):
        load_sensitivity(tmp_path / "none.json", LAYERS)


def test_weighted_errors_are_less_and_plain_ones_more(weighted: RankFit, fit: RankFit) -> None:
    """At equal bits of a group, what the weighted fit minimises is less than the plain fit's."""
    weights = FOUND.layer_weights()
    rows = heldout_rows()
    for ratio in RATIOS:
        errors = []
        for made in (weighted, fit):
            codec = KvtcCodec(made.artifact, ratio, torch.bfloat16)
            decoded = codec.decode(codec.encode(rows["k"], rows["v"], 4))
            cost = plain = 0.0
            for kind in KINDS:
                found = decoded.k if kind == "k" else decoded.v
                squared = (found.float() - rows[kind].float()).square().sum((0, 2, 3))
                cost += float((squared * weights[kind].square()).sum())
                plain += float(squared.sum())
            errors.append((cost, plain))
        assert errors[0][0] < 0.8 * errors[1][0]
        assert errors[0][1] > errors[1][1]


def heldout_rows() -> dict[Kind, torch.Tensor]:
    """K (not rotated) and V of the held-out document, as in its cache."""
    kinds: tuple[tuple[Kind, int, int], ...] = (("k", SIZE, 1), ("v", SIZE_V, 2))
    return {kind: toy_rows(size, seed)[DOCS - 1].bfloat16() for kind, size, seed in kinds}


def test_held_out_errors_are_stated_for_both_domains(weighted: RankFit, fit: RankFit) -> None:
    check_artifact(weighted.artifact)
    for key, section in weighted.artifact.sections.items():
        plain = weighted.sections[key].plain_error
        assert plain is not None
        for ratio in RATIOS:
            expected = section.plans[ratio].expected_error
            assert section.heldout_error[ratio] == pytest.approx(expected, rel=0.35, abs=1e-4)
        # Keys get no bits at all at that ratio.
        if key[1] == "v":
            assert plain[8.0] > 1.5 * section.heldout_error[8.0]
        assert fit.sections[key].plain_error is None


def test_a_layer_group_has_one_budget(weighted: RankFit) -> None:
    """Values weigh ten times what keys do here, and get more than their half."""
    geometry = weighted.artifact.geometry
    for group in (0, 1):
        sizes = {kind: geometry.row_size(group, kind) for kind in KINDS}
        for ratio in RATIOS:
            taken = {
                kind: plan_bits(bit_plan(weighted.artifact.sections[group, kind], ratio))
                for kind in KINDS
            }
            both = budget_bits(sum(sizes.values()), ratio)
            assert 0.9 * both < sum(taken.values()) <= both
            assert taken["v"] > both * sizes["v"] / sum(sizes.values())


def test_a_key_share_overrides_the_common_budget(weighted: RankFit, reader: SpoolReader) -> None:
    shared = fit_weighted(reader, key_share=0.6)

    def bits(fit: RankFit, group: int, kind: Kind, ratio: float) -> int:
        return plan_bits(bit_plan(fit.artifact.sections[group, kind], ratio))

    for group in (0, 1):
        both = sum(reader.geometry.row_size(group, kind) for kind in KINDS)
        for ratio in RATIOS:
            budget = budget_bits(both, ratio)
            assert bits(shared, group, "k", ratio) <= 0.6 * budget
            assert bits(shared, group, "v", ratio) <= 0.4 * budget + 1
        # By itself the allocation gives keys, which weigh little here, far less.
        assert bits(shared, group, "k", 8.0) > bits(weighted, group, "k", 8.0)


def test_weights_are_part_of_the_fingerprint(weighted: RankFit, reader: SpoolReader) -> None:
    other = msgspec.structs.replace(FOUND, keys=(2e-6, 4e-6, 1e-6, 1e-6))
    changed = fit_weighted(reader, sensitivity=other)
    assert changed.artifact.fingerprint != weighted.artifact.fingerprint
    assert fit_weighted(reader).artifact.fingerprint == weighted.artifact.fingerprint


def test_a_common_budget_costs_memory() -> None:
    large = Geometry(LAYERS, 8, 128, 128, ((0, LAYERS),))
    plain = estimate_fit(large, 10_000, RATIOS, FitSettings())
    both = estimate_fit(large, 10_000, RATIOS, FitSettings(sensitivity=FOUND))
    assert both.peak_bytes > plain.peak_bytes


def test_the_fast_codec_reads_what_the_reference_writes(weighted: RankFit) -> None:
    rows = heldout_rows()
    reference = KvtcCodec(weighted.artifact, 4.0, torch.bfloat16)
    fast = CpuKvtcCodec(weighted.artifact, 4.0, torch.bfloat16)
    wanted = reference.decode(reference.encode(rows["k"], rows["v"], 4))
    for writer, reader_ in ((reference, fast), (fast, reference), (fast, fast)):
        found = reader_.decode(writer.encode(rows["k"], rows["v"], 4))
        for mine, other in ((found.k, wanted.k), (found.v, wanted.v)):
            difference = (mine.float() - other.float()).square().sum()
            assert float(difference / other.float().square().sum()) < 1e-3


def test_card_and_report_show_the_weights(
    weighted: RankFit, reader: SpoolReader, fit: RankFit, tmp_path: Path
) -> None:
    description = Description("org/toy", IDENTITY, "bfloat16", DATA)
    directory = write_artifact(tmp_path, description, [weighted], [reader.probe()])
    card = load_card(directory)
    weights = FOUND.layer_weights()
    assert card.sensitivity is not msgspec.UNSET
    assert card.sensitivity.key_weights == pytest.approx(weights["k"].tolist())
    assert card.sensitivity.value_weights == pytest.approx(weights["v"].tolist())
    assert (card.sensitivity.documents, card.sensitivity.seed) == ((0, 2, 3), 5)
    for section in card.sections:
        plain = weighted.sections[section.group, section.kind].plain_error
        assert {e.ratio: e.heldout_plain for e in section.errors} == plain
    artifact, _, _ = load_rank_artifact(directory, 0)
    for key, section_basis in weighted.artifact.sections.items():
        loaded = artifact.sections[key].weights
        assert loaded is not None
        assert torch.equal(loaded, row_weights(weights[key[1]], reader.geometry, *key))
        assert section_basis.weights is not None
    report = (directory / "report.md").read_text()
    assert "180 tokens of 3 documents (numbers 0, 2, 3)" in report
    assert "without their weights" in report
    plain_card = json.loads(
        (write_artifact(tmp_path, description, [fit], [reader.probe()]) / "card.json").read_text()
    )
    assert "sensitivity" not in plain_card
    assert "heldout_plain" not in plain_card["sections"][0]["errors"][0]
