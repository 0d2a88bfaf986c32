from __future__ import annotations

import pytest
import torch

from kvtc_vllm.calibration.acceptance import check_artifact
from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings, estimate_fit, own_ratio
from kvtc_vllm.calibration.section_fit import HeldoutErrors, heldout_errors
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.artifact import KINDS
from kvtc_vllm.codec.bitplan import apply_plan, budget_bits, plan_bits
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import bit_plan
from kvtc_vllm.codec.transform import to_coefficients
from tests.calibration.toy import DOCS, RATIOS, SIZE, SIZE_V, toy_rows


def test_every_section_has_every_plan(fit: RankFit) -> None:
    artifact = fit.artifact
    assert artifact.ratios() == RATIOS
    assert set(artifact.sections) == {(g, kind) for g in (0, 1) for kind in KINDS}
    for (group, kind), section in artifact.sections.items():
        p = artifact.geometry.row_size(group, kind)
        assert section.mean.shape == (p,)
        assert section.mean.dtype == torch.float32
        assert section.basis.dtype == torch.float16
        # Trimmed to what the plans read.
        assert section.basis.shape == (p, max(plan.rank for plan in section.plans.values()))
        for ratio, plan in section.plans.items():
            assert plan_bits(plan) <= budget_bits(p, ratio)


def test_columns_stand_in_order_of_variance(fit: RankFit, reader: SpoolReader) -> None:
    for (group, kind), section in fit.artifact.sections.items():
        rows = reader.rows(group, kind, heldout=False)
        coefficients = to_coefficients(rows, section, section.basis.shape[1])
        variance = coefficients.double().square().mean(dim=0)
        assert bool((variance[1:] <= 1.001 * variance[:-1]).all())
        expected = fit.sections[group, kind].variance[: len(variance)]
        torch.testing.assert_close(variance, expected, rtol=1e-2, atol=0)


def test_heldout_error_follows_the_prediction(fit: RankFit) -> None:
    for section in fit.artifact.sections.values():
        errors = [section.heldout_error[ratio] for ratio in RATIOS]
        assert errors == sorted(errors)
        for ratio in RATIOS:
            assert section.heldout_error[ratio] == pytest.approx(
                section.plans[ratio].predicted_error, rel=0.35
            )


def test_heldout_error_is_what_the_codec_does(fit: RankFit, reader: SpoolReader) -> None:
    """The held-out error is that of real blobs."""
    artifact = fit.artifact
    rows = reader.rows(0, "v", heldout=True)
    values = toy_rows(SIZE_V, 2)[DOCS - 1].bfloat16()
    keys = toy_rows(SIZE, 1)[DOCS - 1].bfloat16()
    codec = KvtcCodec(artifact, 4.0, torch.bfloat16)
    decoded = codec.decode(codec.encode(keys, values, 4))
    section = artifact.sections[0, "v"]
    error = (decoded.v[:, :2].float().flatten(1) - rows).square().sum()
    relative = float(error / (rows - section.mean).square().sum())
    assert relative == pytest.approx(section.heldout_error[4.0], rel=0.05)


def test_same_seed_same_artifact(fit: RankFit, reader: SpoolReader) -> None:
    again = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        RATIOS,
        settings=FitSettings(simulation_rows=512),
    ).artifact
    assert again.fingerprint == fit.artifact.fingerprint


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_keys_have_their_share_of_one_budget(
    reader: SpoolReader, fit: RankFit, share: float
) -> None:
    divided = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        RATIOS,
        settings=FitSettings(simulation_rows=512, key_share=share),
    )
    check_artifact(divided.artifact)
    assert divided.artifact.ratios() == RATIOS
    assert divided.artifact.fingerprint != fit.artifact.fingerprint
    finer, coarser = ("v", "k") if share < 2 / 3 else ("k", "v")  # keys are twice as long
    for group in (0, 1):
        for ratio in RATIOS:
            errors = {
                kind: (
                    divided.artifact.sections[group, kind].heldout_error[ratio],
                    fit.artifact.sections[group, kind].heldout_error[ratio],
                )
                for kind in KINDS
            }
            assert errors[finer][0] <= errors[finer][1]
            assert errors[coarser][0] >= errors[coarser][1]
        sections = {kind: divided.artifact.sections[group, kind] for kind in KINDS}
        sizes = {kind: len(section.mean) for kind, section in sections.items()}
        assert sizes["k"] != sizes["v"]
        for ratio in RATIOS:
            taken = {kind: plan_bits(s.plans[ratio]) for kind, s in sections.items()}
            budget = budget_bits(sum(sizes.values()), ratio)
            assert taken["k"] <= share * budget
            assert taken["v"] <= (1 - share) * budget + 1
            assert {s.plans[ratio].ratio for s in sections.values()} == {ratio}


def test_a_share_beyond_the_cache_is_refused(reader: SpoolReader) -> None:
    with pytest.raises(ArtifactError, match=r"key share of 0\.9 at ratio 1.2 gives K more bits"):
        own_ratio(reader.geometry, 0, "k", 1.2, 0.9)
    with pytest.raises(ArtifactError, match="key share 1 must"):
        own_ratio(reader.geometry, 0, "k", 8.0, 1)


def test_fewer_rows_and_progress(reader: SpoolReader, fit: RankFit) -> None:
    stages = set()
    small = fit_rank(
        reader,
        reader.geometry,
        reader.ropes,
        reader.layer_rope,
        (4.0,),
        settings=FitSettings(train_rows=100, heldout_rows=50, method="rsvd"),
        progress=lambda section, stage, done, total: stages.add((section, stage)),
    )
    detail = small.sections[1, "k"]
    assert (detail.train_rows, detail.heldout_rows, detail.method) == (100, 50, "rsvd")
    assert ("v1", "allocate") in stages
    assert small.artifact.fingerprint != fit.artifact.fingerprint


def test_heldout_error_of_constant_rows(fit: RankFit) -> None:
    section = fit.artifact.sections[0, "k"]
    plans = {2.0: bit_plan(section, 2.0)}
    found = heldout_errors(section, plans, [section.mean.expand(3, -1)], apply_plan)
    assert found == HeldoutErrors(weighted={2.0: 0.0}, plain={2.0: 0.0})


def test_missing_rows_are_refused(reader: SpoolReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "count", lambda heldout: 0 if heldout else 10)
    with pytest.raises(ArtifactError, match="0 held-out"):
        fit_rank(reader, reader.geometry, reader.ropes, reader.layer_rope, RATIOS)


def test_estimate_covers_the_rows(reader: SpoolReader) -> None:
    rows = 1000
    estimate = estimate_fit(reader.geometry, rows, RATIOS, FitSettings(method="rsvd"))
    assert estimate.peak_bytes > rows * reader.geometry.row_size(0, "k") * 4
