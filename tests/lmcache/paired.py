"""An artifact of the reference model whose K and V share a basis, without running the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtc_vllm.artifact.card import DataCard
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.calibration import writing
from kvtc_vllm.calibration.fit import fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.calibration.writing import Description, write_artifact
from kvtc_vllm.codec.artifact import Kind
from tests.lmcache.chunks import MODEL, probed

DATA = DataCard(files=(), tokens=128, train_tokens=128, heldout_tokens=128, seed=0)


class ProbeRows(CapturedRows):
    """The shipped artifact's probe, which chunks are drawn from, once to fit and once to check."""

    def __init__(self) -> None:
        artifact, self._probe = probed()
        count = len(self._probe.k)
        positions = self._probe.positions.long().repeat(2)
        document = torch.arange(2).repeat_interleave(count)
        super().__init__(
            artifact.geometry,
            artifact.ropes,
            artifact.layer_rope,
            positions,
            document,
            document == 1,
        )

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        own = index % len(self._probe.k)
        if kind == "v":
            return self._probe.v[own, first:end]
        return self.ropes[0].apply(self._probe.k[own, first:end].float(), self.positions[index])


def paired_artifact(registry: Path, ratio: float) -> Path:
    """Fit and write it; returns its directory."""
    rows = ProbeRows()
    settings = FitSettings(codec="kvtc2", paired=True)
    fit = fit_rank(
        rows, rows.geometry, rows.ropes, rows.layer_rope, (ratio,), sinks=(), settings=settings
    )
    description = Description("kvtc-reference", model_identity(str(MODEL)), "bfloat16", DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_report", lambda *_: None)
        return write_artifact(registry, description, [fit], [rows.probe()])
