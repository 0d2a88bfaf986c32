"""What the codec's benchmarks run on: an artifact and one chunk of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.power_law import PowerLaw
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.codec.artifact import Geometry, Kind, RankArtifact

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "reference_model" / "model"
SMALL_MODEL = Geometry(30, 3, 64, 64, ((0, 30),))
"""The shape of SmolLM2-135M's cache."""


@dataclass(frozen=True)
class Rows:
    """k [T, L, H, D] post-RoPE and v [T, L, H, Dv], bfloat16, of positions start .. start + T - 1.

    source: where they are from, in words.
    """

    artifact: RankArtifact
    k: torch.Tensor
    v: torch.Tensor
    start: int
    source: str

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    @property
    def tokens(self) -> int:
        return self.k.shape[0]

    def mean(self, group: int, tensor: Kind) -> torch.Tensor:
        """The artifact's, of K's or V's rows of a layer group: float32 [p]."""
        (found,) = (
            self.artifact.sections[group, name].mean[parts[tensor]]
            for name in self.artifact.section_names
            if tensor in (parts := self.artifact.geometry.row_parts(group, name))
        )
        return found


def probe_rows(directory: Path | None, tokens: int) -> Rows:
    """An artifact's probe, held-out rows of one document, repeated; None: the reference model's."""
    if directory is None:
        directory = find(model_identity(MODEL), 1, 16.0, model_name=str(MODEL))
    artifact, _, probe = load_rank_artifact(directory, 0)
    index = torch.arange(tokens) % probe.k.shape[0]
    # One position per row, past the sinks; the keys are turned to where they are said to be.
    start = tokens
    keys = probe.k[index].float()
    positions = torch.arange(start, start + tokens)
    for layer, which in enumerate(artifact.layer_rope):
        if which is not None:
            keys[:, layer] = artifact.ropes[which].apply(keys[:, layer], positions)
    k, v = keys.to(torch.bfloat16), probe.v[index].to(torch.bfloat16)
    return Rows(artifact, k, v, start, f"{directory.parent.name}, its probe")


def power_law_rows(tokens: int, ratios: tuple[float, ...]) -> Rows:
    """Made up, in the shape of SmolLM2-135M."""
    model = PowerLaw(SMALL_MODEL, ratios)
    artifact = model.artifact()
    k, v = model.chunk(artifact, tokens, tokens)
    return Rows(artifact, k, v, tokens, "power law in the shape of SmolLM2-135M")
