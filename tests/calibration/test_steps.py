"""Codec 2's plans fitted to captured rows: real ratios, one step, sinks, artifacts that serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings, estimate_fit
from kvtc_vllm.calibration.parts import part_elements
from kvtc_vllm.calibration.sinks import SinkFit
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.step_classes import PRICE_OF_A_BIT, Sample, StepSettings, make_step_plan
from kvtc_vllm.calibration.step_fit import document_length, overhead_bytes, sample_index
from kvtc_vllm.calibration.step_plans import CHUNK_TOKENS
from kvtc_vllm.calibration.writing import Description, write_artifact
from kvtc_vllm.cli.inspect import describe_artifact
from kvtc_vllm.codec.artifact import KINDS, PAIRED, Geometry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.calibration.toy import DATA, DOC_TOKENS, DOCS, IDENTITY, LAYERS

RATIOS = (3.0, 6.0)
TURNED = 12
"""Columns of all layers of a basis in parts, of 48."""
LAYERS_OF_RULE = (0, 2)
SHARE = 0.02
"""Of the toy's tokens, none of which is a sink, marked as if they were."""


def sinks_of(reader: SpoolReader) -> SinkFit:
    index = torch.arange(len(reader.positions))
    measure = SinkRule(LAYERS_OF_RULE, 0.0).measure(reader.cache_rows("v", index, 0, LAYERS))
    rule = SinkRule(LAYERS_OF_RULE, float(measure.quantile(SHARE)), max_share=0.05)
    return SinkFit(rule, 1.0, 0.1, train_share=SHARE, heldout_share=SHARE, documents=1.0)


def fitted(reader: SpoolReader, **changes: Any) -> RankFit:
    arguments: dict[str, Any] = {"ratios": RATIOS, "sinks": (sinks_of(reader),), "sink_tokens": 4}
    arguments |= changes
    changed = {"simulation_rows": 1024} | arguments.pop("settings", {})
    settings = FitSettings(codec="kvtc2", **changed)
    return fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        settings=settings,
        **arguments,
    )


@pytest.fixture(scope="module")
def apart(reader: SpoolReader) -> RankFit:
    return fitted(reader)


@pytest.fixture(scope="module")
def paired(reader: SpoolReader) -> RankFit:
    return fitted(reader, settings={"paired": True})


@pytest.fixture(scope="module")
def in_parts(reader: SpoolReader) -> RankFit:
    """Each layer of a layer group, K and V of it, is a part."""
    return fitted(reader, settings={"paired": True, "parts": 2, "turned": TURNED / 48})


@pytest.fixture(scope="module", params=["apart", "paired", "in_parts"])
def steps(request: pytest.FixtureRequest) -> RankFit:
    found: RankFit = request.getfixturevalue(request.param)
    return found


def test_columns_of_one_part_are_zero_in_the_other(in_parts: RankFit, paired: RankFit) -> None:
    """At a somewhat larger error, and with the same bytes."""
    for (group, name), section in in_parts.artifact.sections.items():
        parts = part_elements(in_parts.artifact.geometry, group, name, 2)
        used = torch.stack([(section.basis[part] != 0).any(dim=0) for part in parts])
        assert int(used.all(dim=0).sum()) == TURNED < section.basis.shape[1]
        assert bool(used.any(dim=0).all())
        whole = paired.artifact.sections[group, name]
        for ratio in RATIOS:
            assert 1 < section.heldout_error[ratio] / whole.heldout_error[ratio] < 2


def plans(fit: RankFit, ratio: float) -> list[StepPlan]:
    found = [section.plans[ratio] for section in fit.artifact.sections.values()]
    assert all(isinstance(plan, StepPlan) for plan in found)
    return [plan for plan in found if isinstance(plan, StepPlan)]


def test_all_sections_share_one_step(steps: RankFit) -> None:
    for ratio in RATIOS:
        assert len({plan.step for plan in plans(steps, ratio)}) == 1
    low, high = (plans(steps, ratio)[0].step for ratio in RATIOS)
    assert low < high


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios_are_of_real_bytes(
    steps: RankFit, reader: SpoolReader, ratio: float, heldout: bool
) -> None:
    """Of every document, from its first position, whose sinks are exact."""
    codec = open_codec("kvtc2", torch.bfloat16, artifact=steps.artifact, ratio=ratio)
    taken = raw = 0
    for doc in range(DOCS):
        index = ((reader.docs == doc) & (reader.heldout == heldout)).nonzero().flatten()
        if not len(index):
            continue
        # The spool has no sinks; any tokens do for their size.
        index = torch.cat((index[:4], index))
        k, v = (reader.cache_rows(kind, index, 0, LAYERS) for kind in ("k", "v"))
        for start in range(0, len(index), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            taken += len(codec.encode(k[part], v[part], start))
            raw += k[part].nbytes + v[part].nbytes
    assert raw / taken == pytest.approx(ratio, rel=0.15 if heldout else 0.1)


def test_bytes_on_the_sample_are_within_a_hundredth(steps: RankFit, reader: SpoolReader) -> None:
    geometry = reader.geometry
    overhead = overhead_bytes(reader, geometry, 4, steps.artifact.sink_rule, ENTROPY)
    row = sum(geometry.row_size(*key) for key in steps.artifact.sections)
    for ratio in RATIOS:
        total = overhead + sum(plan.token_bytes for plan in plans(steps, ratio))
        assert total == pytest.approx(2 * row / ratio, rel=0.01)


def test_the_sample_is_of_neighbours(reader: SpoolReader) -> None:
    settings = FitSettings(codec="kvtc2", simulation_rows=3 * CHUNK_TOKENS)
    index = sample_index(reader, settings, torch.Generator().manual_seed(0))
    assert len(index) == 3 * CHUNK_TOKENS
    for block in index.split(CHUNK_TOKENS):
        assert torch.equal(block, torch.arange(int(block[0]), int(block[0]) + CHUNK_TOKENS))
    assert not reader.heldout[index].any()
    assert document_length(reader) == 4 + DOC_TOKENS


def test_the_rule_is_in_the_artifact_if_it_is_wanted(apart: RankFit, reader: SpoolReader) -> None:
    assert apart.artifact.sink_rule == sinks_of(reader).rule
    plain = fitted(reader, settings={"protect_sinks": False})
    assert plain.artifact.sink_rule is None
    version_1 = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        (4.0,),
        sinks=(sinks_of(reader),),
        settings=FitSettings(simulation_rows=128),
    )
    assert version_1.artifact.sink_rule is None


def test_finer_sinks_take_bytes_from_the_others(apart: RankFit, reader: SpoolReader) -> None:
    finest = fitted(reader, settings={"steps": StepSettings(sink_gain=64.0)})
    assert plans(finest, 6.0)[0].sink_gain == 64.0
    assert plans(finest, 6.0)[0].step > plans(apart, 6.0)[0].step


def test_the_columns_of_sinks_do_not_depend_on_the_other_ratios(reader: SpoolReader) -> None:
    """The lowest ratio alone would leave columns out that finer steps of sinks read."""
    few = {"paired": True, "simulation_rows": 512}
    alone = plans(fitted(reader, ratios=(40.0,), settings=few), 40.0)[0]
    beside = plans(fitted(reader, ratios=(3.0, 40.0), settings=few), 40.0)[0]
    assert alone.total_rank == beside.total_rank
    assert alone.total_rank > alone.rank


def test_expected_errors_are_met_on_held_out_rows(steps: RankFit) -> None:
    for section in steps.artifact.sections.values():
        for ratio in RATIOS:
            expected = section.plans[ratio].expected_error
            assert section.heldout_error[ratio] == pytest.approx(expected, rel=0.35, abs=2e-3)


def test_a_ratio_that_headers_forbid_is_refused(reader: SpoolReader) -> None:
    with pytest.raises(ArtifactError, match=r"ratio 300 can't be met: headers and exact sinks"):
        fitted(reader, ratios=(6.0, 300.0))


def test_rows_that_need_fewer_bytes_than_there_are_get_fewer(reader: SpoolReader) -> None:
    """No step takes as many: codes end before."""
    fit = fitted(reader, ratios=(1.05, 6.0), settings={"paired": True})
    row = sum(fit.artifact.geometry.row_size(*key) for key in fit.artifact.sections)
    assert sum(plan.token_bytes for plan in plans(fit, 1.05)) < 2 * row / 1.1
    assert all(plan.expected_error < 1e-4 for plan in plans(fit, 1.05))
    codec = open_codec("kvtc2", torch.bfloat16, artifact=fit.artifact, ratio=1.05)
    k, v = (reader.cache_rows(kind, torch.arange(128), 0, LAYERS) for kind in KINDS)
    # Four times what was calibrated.
    assert codec.encode(4 * k, 4 * v, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "raw"}, "codec 'raw' has no artifacts; kvtc, kvtc2 have"),
        ({"codec": "kvtc", "paired": True}, "codec 'kvtc' has a basis each for K and V"),
        (
            {"codec": "kvtc2", "paired": True, "key_share": 0.4},
            "key share 0.4: K and V that share a basis have no shares",
        ),
    ],
)
def test_what_no_codec_does_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitSettings(**settings)


def test_the_estimate_has_all_bases_at_once(reader: SpoolReader) -> None:
    """One step for all takes the coefficients of all: no section is done before the others."""
    geometry = Geometry(64, 8, 128, 128, tuple((i, i + 4) for i in range(0, 64, 4)))
    for paired in (False, True):
        settings = FitSettings(codec="kvtc2", paired=paired, simulation_rows=128)
        found = estimate_fit(geometry, 20_000, (2.0,), settings)
        names = settings.section_names
        bases = sum(2 * geometry.row_size(g, n) ** 2 for g in range(16) for n in names)
        assert bases < found.peak_bytes < 2 * bases
    one = replace(geometry, layer_groups=((0, 64),))
    apart, pair = (
        estimate_fit(one, 20_000, (8.0,), FitSettings("eigh", codec="kvtc2", paired=paired))
        for paired in (False, True)
    )
    # Covariance and workspace grow with the square of the row, which is twice as long.
    assert 3 * apart.peak_bytes < pair.peak_bytes < 4 * apart.peak_bytes
    assert 3 * apart.pca_seconds < pair.pca_seconds < 4 * apart.pca_seconds


def test_it_is_written_found_and_served(
    steps: RankFit, reader: SpoolReader, written: Path, tmp_path: Path
) -> None:
    description = Description("org/toy", IDENTITY, "bfloat16", DATA)
    directory = write_artifact(tmp_path, description, [steps], [reader.probe()])
    card = load_card(directory)
    assert (card.codec_name, load_card(written).codec_name) == ("kvtc2", "kvtc")
    known = {round(plan.token_bytes, 6) for ratio in RATIOS for plan in plans(steps, ratio)}
    assert {round(e.token_bytes, 6) for s in card.sections for e in s.errors} == known
    report = (directory / "report.md").read_text()
    assert "coefficients in" in report
    paired = steps.artifact.section_names == PAIRED
    assert ("| 0 | KV group 1 | 48 |" in report) == ("which share a basis" in report) == paired
    assert ("| 0 | V group 1 | 16 |" in report) == ("one step for both" in report) != paired
    described = describe_artifact(directory)["sections"]
    assert [s["row"] for s in described] == ([48, 48] if paired else [32, 16, 32, 16])
    assert "Ratios are of all bytes of blobs of 128 tokens" in report
    found = find(IDENTITY, 1, 6.0, model_name="org/toy", codec="kvtc2", registries=[tmp_path])
    assert found == directory
    with pytest.raises(ArtifactError, match="calibrated for codec kvtc2, this is kvtc"):
        find(IDENTITY, 1, 6.0, model_name="org/toy", codec="kvtc", registries=[tmp_path])
    artifact, _, probe = load_rank_artifact(directory, 0)
    assert artifact.sink_rule == sinks_of(reader).rule
    codec = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=6.0)
    k, v = probe.k.bfloat16(), probe.v.bfloat16()
    assert codec.decode(codec.encode(k, v, 4), 4, len(k)).k.shape == k.shape


def test_a_plan_of_rows_without_variance_stores_nothing() -> None:
    sample = Sample(torch.zeros(128, 4), 0.0, 4)
    plan = make_step_plan(sample, torch.zeros(128, dtype=torch.bool), 0.5, StepSettings())
    assert (plan.rank, plan.expected_error) == (0, 0.0)
    assert plan.restore(plan.quantise(torch.zeros(3, 0))).shape == (3, 0)


def test_columns_are_kept_while_they_are_worth_their_bits() -> None:
    """Deviations fall through a step: what is far below it is not coded."""
    drawn = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    sample = Sample(drawn * torch.logspace(1, -1.5, 64), 0.0, 64)
    none = torch.zeros(4096, dtype=torch.bool)
    plan = make_step_plan(sample, none, 1.0, StepSettings(column_bits=0.0))
    dearer = make_step_plan(sample, none, 1.0, StepSettings(column_bits=0.5))
    assert 20 < dearer.rank < plan.rank < 45
    error = (sample.coefficients - padded(plan, sample.coefficients)).square().sum()
    energy = sample.coefficients.square().sum()
    assert plan.expected_error == pytest.approx(float(error / energy), rel=1e-3)


def test_sinks_have_columns_of_their_own() -> None:
    """As many as finer steps need; few sinks have none."""
    drawn = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    sample = Sample(drawn * torch.logspace(1, -1.5, 64), 0.0, 64)
    marks = torch.arange(4096) % 20 == 0
    plan = make_step_plan(sample, marks, 1.0, StepSettings(sink_gain=4.0))
    assert plan.beyond is not None
    assert plan.rank < plan.beyond.rank + plan.rank == plan.total_rank <= 64
    assert plan.beyond.expected_error == plan.expected_error
    sinks = sample.coefficients[marks] * plan.sink_gain
    own = sinks[:, plan.rank : plan.total_rank]
    error = (own - plan.beyond.restore(plan.beyond.quantise(own))).square().sum()
    assert float(error) < 0.3 * float(own.square().sum())
    few = torch.arange(4096) % 1000 == 0
    assert make_step_plan(sample, few, 1.0, StepSettings()).beyond is None


def test_rounding_by_price_saves_bits_that_are_worth_more_than_their_error() -> None:
    """Against plain rounding with the same step: error goes up by less than the bits' price."""
    drawn = torch.randn(8192, 8, generator=torch.Generator().manual_seed(1)) * 0.6
    sample = Sample(drawn, 0.0, 8)
    none = torch.zeros(len(drawn), dtype=torch.bool)
    settings = StepSettings(column_bits=0.0)
    priced = make_step_plan(sample, none, 1.0, settings)
    plain = replace(priced, rounding=torch.tensor([[0.5, 0.5]]).expand(len(priced.widths), 2))
    costs = []
    for plan in (priced, plain):
        codes = plan.quantise(drawn)
        error = float((drawn - plan.restore(codes)).square().mean())
        probability = codes.flatten().bincount().double() / codes.numel()
        bits = -float((probability * probability.clamp_min(1e-12).log2()).sum())
        costs.append(error + PRICE_OF_A_BIT * bits)
    assert costs[0] < costs[1]


def padded(plan: StepPlan, coefficients: torch.Tensor) -> torch.Tensor:
    restored = plan.restore(plan.quantise(coefficients))
    missing = coefficients.shape[1] - plan.rank
    return torch.nn.functional.pad(restored, (0, missing))
