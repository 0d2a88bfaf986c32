"""How far apart sensitivities of different documents and metrics are, without coding anything.

    python -m benchmarks.sensitivity_mismatch --model DIR --spool DIR --data DIR --work DIR
                                              [--out benchmarks/results/sensitivity-mismatch.json]

Bits that are divided by sensitivities F leave an error in each element in proportion to 1 / F. If
others, F', are the true ones, the same bits cost more: by the arithmetic mean of F' / F over its
geometric mean, where rates are high. 1 is no loss. At low rates, where most components have no
bits, the loss is less, so this ranks choices and does not predict KL. Sensitivities and truth are
of different documents, except where the name says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.sensitivity import ROOT
from benchmarks.sensitivity_gradients import RETRIEVAL, TEXTS, Gradients, collect, marked_share
from kvtc_vllm.calibration.sinks import fit_sinks
from kvtc_vllm.calibration.spool import SpoolReader

SHRINKAGE = 0.1


def main() -> None:
    """Compare, print and write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.sensitivity_mismatch", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--spool", type=Path, required=True, help="of kvtc calibrate --spool")
    parser.add_argument("--data", type=Path, required=True, help="of the public documents")
    parser.add_argument("--work", type=Path, required=True, help="where gradients are kept")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/sensitivity-mismatch.json"
    )
    args = parser.parse_args()
    reader = SpoolReader(args.spool / "rank0")
    kept = args.work / "gradients.pt"
    # What gradients were kept with stays.
    sinks = None if kept.exists() else fit_sinks(reader)
    ropes = [None if i is None else reader.ropes[i] for i in reader.layer_rope]
    args.work.mkdir(parents=True, exist_ok=True)
    rule = None if sinks is None else sinks.rule
    found = collect(args.model, args.data, reader.geometry, ropes, rule, kept)
    table = compare(found)
    kinds = sorted({document.kind for document in found})
    result = {
        "command": "python -m benchmarks.sensitivity_mismatch --model DIR --spool DIR --data DIR "
        "--work DIR",
        "model": args.model.name,
        "sinks, per cent": {kind: marked_share(found, kind) for kind in kinds},
        "unit": "loss factor of weighted error at equal bits, at high rates; 1 is none",
        "loss": table,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for group, losses in table.items():
        for name, loss in losses.items():
            print(f"{group:22} {name:22} {loss:.3f}")


def compare(found: Sequence[Gradients]) -> dict[str, dict[str, float]]:
    """Loss factors by question and answer."""
    texts = [g for g in found if g.kind in TEXTS]
    prompts = [g for g in found if g.kind == RETRIEVAL]
    # Kinds come in turn, so every second group of them is of all kinds.
    groups = [texts[i : i + len(TEXTS)] for i in range(0, len(texts), len(TEXTS))]
    half, other = ([g for group in groups[i::2] for g in group] for i in range(2))
    truth = matrices(other)
    own = of_head(half).mean(dim=-1, keepdim=True).expand_as(of_head(half))
    unit = torch.eye(truth.shape[-1], dtype=torch.float64)
    return {
        "metric": {
            "none": matrix_loss(truth, unit.expand_as(truth)),
            "layer": matrix_loss(truth, own[..., None, None] * unit),
            "head": matrix_loss(truth, of_head(half)[..., None, None] * unit),
            "matrix": matrix_loss(truth, shrunk(matrices(half))),
        },
        "documents": {
            str(n): loss(of_layer(other), of_layer(half[:n])) for n in (1, 3, 6, len(half))
        },
        "kinds (row used on)": {
            f"{row} on {column}": loss(
                of_layer([g for g in other if g.kind == column]),
                of_layer([g for g in half if g.kind == row]),
            )
            for row in TEXTS
            for column in TEXTS
        },
        "retrieval": {
            "texts on retrieval": loss(of_layer(prompts[1::2]), of_layer(half)),
            "both on retrieval": loss(of_layer(prompts[1::2]), of_layer([*half, *prompts[0::2]])),
            "retrieval on retrieval": loss(of_layer(prompts[1::2]), of_layer(prompts[0::2])),
            "both on texts": loss(of_layer(other), of_layer([*half, *prompts[0::2]])),
            "retrieval on texts": loss(of_layer(other), of_layer(prompts[0::2])),
        },
        "tokens": {
            "all on ordinary": loss(of_layer(other, ordinary=True), of_layer(half)),
            "ordinary on ordinary": loss(
                of_layer(other, ordinary=True), of_layer(half, ordinary=True)
            ),
            "ordinary on all": loss(of_layer(other), of_layer(half, ordinary=True)),
            "ordinary on retrieval": loss(of_layer(prompts), of_layer(half, ordinary=True)),
        },
    }


def loss(truth: torch.Tensor, used: torch.Tensor) -> float:
    """Arithmetic over geometric mean of truth / used. Float64, of one shape."""
    ratio = truth / used
    return round(float(ratio.mean() / ratio.log().mean().exp()), 4)


def matrix_loss(truth: torch.Tensor, used: torch.Tensor) -> float:
    """The same of positive definite matrices: float64 [..., D, D], over all eigenvalues."""
    ratio = torch.linalg.solve(used, truth)
    mean = ratio.diagonal(dim1=-2, dim2=-1).mean()
    logs = torch.logdet(truth) - torch.logdet(used)
    return round(float(mean / (logs.mean() / truth.shape[-1]).exp()), 4)


def of_head(documents: Sequence[Gradients], *, ordinary: bool = False) -> torch.Tensor:
    """Mean squared gradients: float64 [2, L, H], up to a factor."""
    parts = [d.ordinary if ordinary else d.every for d in documents]
    return torch.stack(parts).sum(dim=0)


def of_layer(documents: Sequence[Gradients], *, ordinary: bool = False) -> torch.Tensor:
    """The same over all heads: float64 [2, L]."""
    return of_head(documents, ordinary=ordinary).sum(dim=-1)


def matrices(documents: Sequence[Gradients]) -> torch.Tensor:
    """Mean g g^T per layer and head: float64 [2, L, H, D, D], up to a factor."""
    summed = torch.stack([d.outer for d in documents]).double().sum(dim=0)
    # Enough for a logarithm, of directions that no gradient ever had.
    unit = torch.eye(summed.shape[-1], dtype=torch.float64)
    return summed + 1e-3 * summed.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None] * unit


def shrunk(given: torch.Tensor) -> torch.Tensor:
    """Shrunk by a tenth towards the mean eigenvalue."""
    level = given.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    unit = torch.eye(given.shape[-1], dtype=torch.float64)
    return (1 - SHRINKAGE) * given + SHRINKAGE * level * unit


if __name__ == "__main__":
    main()
