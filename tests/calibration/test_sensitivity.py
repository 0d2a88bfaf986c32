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
    Average,
    Marked,
    Sensitivity,
    SensitivitySource,
    is_measured,
    load_sensitivity,
    save_sensitivity,
)
from kvtc_vllm.calibration.sinks import SinkFit
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.weights import LEAST_WEIGHT, RowWeights
from kvtc_vllm.calibration.writing import Description, write_artifact
from kvtc_vllm.codec.artifact import APART, KINDS, PAIRED, Geometry, Kind
from kvtc_vllm.codec.bitplan import budget_bits, plan_bits
from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import bit_plan
from kvtc_vllm.codec.sink_rule import SinkRule
from tests.calibration.toy import (
    DATA,
    DOCS,
    HEADS,
    IDENTITY,
    LAYERS,
    RATIOS,
    SIZE,
    SIZE_V,
    toy_rows,
)

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
    all_tokens=Average(
        keys=((0.5e-6, 1.5e-6), (4e-6, 4e-6), (1e-6, 1e-6), (1e-6, 1e-6)),
        values=((4e-4, 4e-4), (1e-6, 1e-6), (1e-4, 1e-4), (0.0, 0.0)),
        tokens=180,
    ),
    ordinary=Average(
        keys=((1e-6, 1e-6), (1e-6, 1e-6), (1e-6, 1e-6), (1e-6, 1e-6)),
        values=((1e-6, 1e-6), (1e-6, 1e-6), (9e-6, 9e-6), (1e-6, 1e-6)),
        tokens=170,
    ),
    marked=Marked(rule=SinkRule((1, 2), -0.5), share=10 / 180, energy=0.6),
    documents=(0, 2, 3),
    source=SOURCE,
)
WEIGHTS = RowWeights(FOUND)


def fit_weighted(reader: SpoolReader, **settings: object) -> RankFit:
    chosen = FitSettings(simulation_rows=512, weights=WEIGHTS)
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
    weights = WEIGHTS.of_layers()
    assert weights["k"][1] / weights["k"][0] == pytest.approx(2.0)
    assert weights["v"][0] / weights["v"][2] == pytest.approx(2.0)
    assert weights["v"][0] / weights["k"][1] == pytest.approx(10.0)
    # One that no gradient reached can still be divided by.
    assert float(weights["v"][3]) == pytest.approx(LEAST_WEIGHT)
    assert float(torch.stack(list(weights.values())).square().mean()) == pytest.approx(1, rel=1e-2)


def test_rows_have_the_weights_of_their_layers(reader: SpoolReader) -> None:
    weights = WEIGHTS.of_layers()["v"].tolist()
    each = reader.geometry.num_kv_heads * SIZE_V
    found = WEIGHTS.of_row(reader.geometry, 1, "v").tolist()
    assert found == [weights[2]] * each + [weights[3]] * each


def test_heads_have_weights_of_their_own(reader: SpoolReader) -> None:
    both = RowWeights(FOUND, metric="head", heads=range(2))
    row = both.of_row(reader.geometry, 0, "k")
    assert len(row) == 2 * HEADS * SIZE
    assert row[:SIZE].unique().numel() == 1
    assert row[SIZE] / row[0] == pytest.approx(3**0.5)
    # A rank's weights are those of its heads, whatever other ranks there are.
    one = replace(reader.geometry, num_kv_heads=1)
    for head in range(2):
        own = RowWeights(FOUND, metric="head", heads=range(head, head + 1))
        assert torch.equal(own.of_row(one, 0, "k")[:SIZE], row[head * SIZE : (head + 1) * SIZE])
    mean = torch.stack([w.square().mean() for w in both.of_heads().values()]).mean()
    assert float(mean) == pytest.approx(1, rel=1e-2)
    alike = RowWeights(FOUND, heads=range(1, 2))
    assert torch.equal(alike.of_row(one, 0, "k"), WEIGHTS.of_row(one, 0, "k"))


def test_heads_that_were_not_told_apart_are_refused() -> None:
    narrow = msgspec.structs.replace(
        FOUND.all_tokens, keys=((1e-6,),) * LAYERS, values=((1e-6,),) * LAYERS
    )
    probed = msgspec.structs.replace(FOUND, method="probe", all_tokens=narrow)
    with pytest.raises(ArtifactError, match="--sensitivity-metric head: this sensitivity, by pro"):
        RowWeights(probed, metric="head", heads=range(2))
    assert RowWeights(probed, heads=range(2)).of_heads()["k"].shape == (LAYERS, 1)


def test_sinks_are_left_out_of_ordinary_weights() -> None:
    weights = RowWeights(FOUND, "ordinary").of_layers()
    assert weights["v"][2] / weights["v"][0] == pytest.approx(3.0)
    assert weights["k"][1] == weights["k"][0]
    none = msgspec.structs.replace(FOUND, ordinary=None, marked=None)
    assert torch.equal(RowWeights(none, "ordinary").of_layers()["v"], WEIGHTS.of_layers()["v"])


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    save_sensitivity(path, FOUND)
    assert load_sensitivity(path, LAYERS, HEADS) == FOUND
    assert [p.name for p in tmp_path.iterdir()] == ["sensitivity.json"]


def average(**changes: object) -> dict:
    """FOUND with something else in the average over all tokens."""
    return {"all_tokens": msgspec.to_builtins(FOUND.all_tokens) | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (average(keys=[[1.0, 1.0]]), "all_tokens.keys has 1 layers, the model has 4"),
        (average(values=[[1.0, 1.0]] * 3 + [[-1.0, 1.0]]), "values has a number that is negative"),
        (average(keys=[[0.0]] * 4, values=[[0.0]] * 4), "are all 0"),
        (average(keys=[[1.0] * 3] * 4), r"has \[2, 3\] numbers per layer; 1 is right, or 2"),
        (average(tokens="x"), "tokens"),
        ({"version": 1, "keys": []}, "version is 1, this program reads 2"),
        ({"ordinary": None}, "ordinary and marked go together"),
        ({"method": "guess"}, "guess"),
        ({"method": "probe"}, "measures rounding; measure again"),
        ({"marked": {"rule": {"layers": [], "threshold": 0}, "share": 0, "energy": 0}}, "layers"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps(msgspec.to_builtins(FOUND) | changes))
    with pytest.raises(ArtifactError, match=message) as raised:
        load_sensitivity(path, LAYERS, HEADS)
    assert str(path) in str(raised.value)
    assert not is_measured(path, LAYERS, HEADS, "gradient", SOURCE, SinkRule((1, 2), -0.5))


def test_a_file_is_used_again_for_the_same_alone(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    rule = SinkRule((1, 2), -0.5)
    assert not is_measured(path, LAYERS, HEADS, "gradient", SOURCE, rule)
    save_sensitivity(path, FOUND)
    assert is_measured(path, LAYERS, HEADS, "gradient", SOURCE, rule)
    assert not is_measured(path, LAYERS, HEADS, "probe", SOURCE, rule)
    assert not is_measured(path, LAYERS, HEADS, "gradient", SOURCE, None)
    other = msgspec.structs.replace(SOURCE, seed=6)
    assert not is_measured(path, LAYERS, HEADS, "gradient", other, rule)
    probed = msgspec.structs.replace(FOUND, method="probe", replayed_in="float32")
    save_sensitivity(path, probed)
    assert is_measured(path, LAYERS, HEADS, "probe", SOURCE, rule)
    # Probed in the model's own dtype, as it once was.
    save_sensitivity(path, msgspec.structs.replace(probed, replayed_in=None))
    assert not is_measured(path, LAYERS, HEADS, "probe", SOURCE, rule)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--sensitivity gradient --spool DIR leaves"):
        load_sensitivity(tmp_path / "none.json", LAYERS, HEADS)


def test_weighted_errors_are_less_and_plain_ones_more(weighted: RankFit, fit: RankFit) -> None:
    """At equal bits of a group, what the weighted fit minimises is less than the plain fit's."""
    weights = WEIGHTS.of_layers()
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


def test_weights_of_a_pair_are_those_of_its_parts() -> None:
    geometry = Geometry(LAYERS, HEADS, SIZE, SIZE_V, ((0, 1), (1, LAYERS)))
    for group in (0, 1):
        k, v, both = (WEIGHTS.of_row(geometry, group, name) for name in (*APART, *PAIRED))
        assert torch.equal(both, torch.cat((k, v)))
        assert len(both) == geometry.row_size(group, "kv")


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
    changed = fit_weighted(reader, weights=RowWeights(FOUND, "ordinary"))
    assert changed.artifact.fingerprint != weighted.artifact.fingerprint
    assert fit_weighted(reader).artifact.fingerprint == weighted.artifact.fingerprint


def test_a_common_budget_costs_memory() -> None:
    large = Geometry(LAYERS, 8, 128, 128, ((0, LAYERS),))
    plain = estimate_fit(large, 10_000, RATIOS, FitSettings())
    both = estimate_fit(large, 10_000, RATIOS, FitSettings(weights=WEIGHTS))
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
    weights = WEIGHTS.of_layers()
    assert card.sensitivity is not msgspec.UNSET
    assert card.sensitivity.key_weights == pytest.approx(weights["k"].tolist())
    assert card.sensitivity.value_weights == pytest.approx(weights["v"].tolist())
    assert (card.sensitivity.documents, card.sensitivity.seed) == ((0, 2, 3), 5)
    assert (card.sensitivity.averaged, card.sensitivity.metric) == ("all", "layer")
    assert card.sensitivity.marked_energy == pytest.approx(0.6)
    assert card.sensitivity.key_head_weights is msgspec.UNSET
    assert card.sinks is msgspec.UNSET
    for section in card.sections:
        plain = weighted.sections[section.group, section.kind].plain_error
        assert {e.ratio: e.heldout_plain for e in section.errors} == plain
    artifact, _, _ = load_rank_artifact(directory, 0)
    for key, section_basis in weighted.artifact.sections.items():
        loaded = artifact.sections[key].weights
        assert loaded is not None
        assert torch.equal(loaded, WEIGHTS.of_row(reader.geometry, *key))
        assert section_basis.weights is not None
    report = (directory / "report.md").read_text()
    assert "180 tokens of 3 documents (numbers 0, 2, 3)" in report
    assert "without their weights" in report
    plain_card = json.loads(
        (write_artifact(tmp_path, description, [fit], [reader.probe()]) / "card.json").read_text()
    )
    assert "sensitivity" not in plain_card
    assert "heldout_plain" not in plain_card["sections"][0]["errors"][0]


def test_card_shows_weights_of_heads_and_sinks(reader: SpoolReader, tmp_path: Path) -> None:
    weights = RowWeights(FOUND, "ordinary", "head", range(2))
    sinks = SinkFit(SinkRule((1, 2), -0.5), 1.7, 0.1, 0.02, 0.03, 0.8)
    made = replace(fit_weighted(reader, weights=weights), sinks=(sinks,))
    description = Description("org/toy", IDENTITY, "bfloat16", DATA)
    directory = write_artifact(tmp_path, description, [made], [reader.probe()])
    card = load_card(directory)
    assert card.sensitivity is not msgspec.UNSET
    assert (card.sensitivity.averaged, card.sensitivity.metric) == ("ordinary", "head")
    assert card.sensitivity.tokens == 170
    assert card.sensitivity.value_head_weights is not msgspec.UNSET
    assert list(card.sensitivity.value_head_weights[2]) == pytest.approx(
        weights.of_heads()["v"][2].tolist()
    )
    assert card.sinks is not msgspec.UNSET
    (found,) = card.sinks
    assert (found.rank, found.layers, found.threshold) == (0, (1, 2), -0.5)
    assert (found.train_share, found.heldout_share) == (0.02, 0.03)
    report = (directory / "report.md").read_text()
    assert "2.00% of the fitted and 3.00% of the held-out tokens" in report
    assert "60% of the gradients' energy" in report
    assert "sinks left out; one weight per layer and head" in report
    none = replace(made, sinks=())
    other = write_artifact(tmp_path, description, [none], [reader.probe()], name="none")
    assert load_card(other).sinks == ()
    assert "no layer shows any" in (other / "report.md").read_text()
