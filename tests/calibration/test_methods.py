"""The three solvers make the same artifact, within what iterating leaves."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.calibration import solvers
from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.calibration.solvers import Method
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind

GEOMETRY = Geometry(4, 2, 32, 32, ((0, 4),))
RATIOS = (16.0, 32.0)
TOKENS = 1200


class Drawn(CapturedRows):
    """Rows of 256 elements whose variance falls as that of real keys: fast, then slowly."""

    def __init__(self) -> None:
        positions = torch.arange(TOKENS)
        layer_rope = (None,) * GEOMETRY.num_layers
        super().__init__(GEOMETRY, (), layer_rope, positions, positions // 100, positions % 10 == 9)
        generator = torch.Generator().manual_seed(3)
        p = GEOMETRY.row_size(0, "k")
        spectrum = torch.arange(1, p + 1) ** -0.8
        self._rows = {}
        for kind in KINDS:
            directions = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
            drawn = torch.randn(TOKENS, p, generator=generator) * spectrum
            self._rows[kind] = (drawn @ directions.T + 1).reshape(TOKENS, 4, 2, 32)

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return self._rows[kind][index, first:end]


@pytest.fixture(scope="module")
def source() -> Drawn:
    return Drawn()


def fitted(source: Drawn, method: Method) -> RankFit:
    return fit_rank(source, GEOMETRY, (), source.layer_rope, RATIOS, settings=FitSettings(method))


@pytest.fixture(scope="module")
def exact(source: Drawn) -> RankFit:
    return fitted(source, "eigh")


@pytest.mark.parametrize("method", ["subspace", "rsvd"])
def test_same_captured_variance_and_errors(source: Drawn, exact: RankFit, method: Method) -> None:
    iterated = fitted(source, method)
    for key, section in iterated.artifact.sections.items():
        detail, best = iterated.sections[key], exact.sections[key]
        assert detail.method == method
        # No plan can read more: 256 bits at 16x, and 2 + 32 / 1024 are the least per column.
        assert len(detail.variance) == len(best.variance) == 126
        captured = float(detail.variance.sum()) / detail.total_variance
        assert captured == pytest.approx(float(best.variance.sum()) / best.total_variance, rel=1e-3)
        for ratio in RATIOS:
            plan, other = section.plans[ratio], exact.artifact.sections[key].plans[ratio]
            assert plan.expected_error == pytest.approx(other.expected_error, rel=1e-3)
            assert section.heldout_error[ratio] == pytest.approx(
                exact.artifact.sections[key].heldout_error[ratio], rel=2e-3
            )


def test_iterating_again_makes_the_same_artifact(source: Drawn) -> None:
    first, again = (fitted(source, "subspace").artifact.fingerprint for _ in range(2))
    assert first == again


@pytest.mark.parametrize("method", ["eigh", "subspace"])
def test_long_rows_have_their_covariance_in_float32(
    source: Drawn, exact: RankFit, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "DOUBLE_LIMIT", 100)
    single = fitted(source, method)
    for key, section in single.artifact.sections.items():
        best = exact.artifact.sections[key]
        for ratio in RATIOS:
            assert section.heldout_error[ratio] == pytest.approx(
                best.heldout_error[ratio], rel=2e-3
            )
