"""What it costs to keep the bases of an artifact in 8 bits instead of 16: KL and file size.

    python -m benchmarks.basis_bits --model DIR --data DIR --artifact NAME=DIR
                                    [--artifact NAME=DIR] [--ratios 16,32,64]
                                    [--out benchmarks/results/basis-bits.json]

Every column of every basis is divided by its largest element, rounded to 127 steps of each sign
and multiplied again, as it would be after reading such a file. Documents, KL and intervals are
those of `benchmarks.sensitivity`. *change* is the difference to the KL with 16 bits over the same
documents, bootstrapped in pairs. Sizes are of means, weights and those columns that plans of the
given ratios read, before any compression.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import ROOT, interval, measure
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import RankArtifact

BITS = (16, 8)
_STEPS = 127


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.basis_bits", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument(
        "--artifact", action="append", required=True, metavar="NAME=DIR", help="may be repeated"
    )
    parser.add_argument("--ratios", default="16,32,64", help="target ratios")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/basis-bits.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    artifacts: dict[str, RankArtifact] = {}
    sizes: dict[str, int] = {}
    for named in args.artifact:
        name, _, directory = named.partition("=")
        artifact = load_rank_artifact(Path(directory), 0)[0]
        for bits in BITS:
            key = f"{name}, {bits} bits"
            artifacts[key] = artifact if bits == 16 else in_eight_bits(artifact)
            sizes[key] = stored_bytes(artifact, ratios, bits)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.basis_bits --model DIR --data DIR "
        + " ".join(f"--artifact {named.partition('=')[0]}=ARTIFACT" for named in args.artifact),
        "model": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
        "bytes": sizes,
    }
    rows: list[dict[str, Any]] = []
    for names, rows in measure(model, tokenizer, args.data, artifacts, ratios):
        for row in rows:
            row["change"], row["change_interval"] = change(row, rows)
        args.out.write_text(
            json.dumps(result | {"documents": names, "rows": rows}, indent=1) + "\n"
        )
    for row in rows:
        low, high = row["change_interval"]
        print(
            f"{row['artifact']:20} {row['target_ratio']:g}x: real {row['real_ratio']:.2f}, "
            f"KL {row['kl']:.5f}, change {row['change']:+.6f} [{low:+.6f}, {high:+.6f}], "
            f"{sizes[row['artifact']] / 1e6:.1f} MB"
        )


def in_eight_bits(artifact: RankArtifact) -> RankArtifact:
    """The artifact with every basis rounded to 8 bits, a scale per column, and back."""
    sections = {
        key: replace(section, basis=_rounded(section.basis))
        for key, section in artifact.sections.items()
    }
    return replace(artifact, sections=sections)


def _rounded(basis: torch.Tensor) -> torch.Tensor:
    scale = basis.float().abs().amax(dim=0) / _STEPS
    # Scales are kept in float16, as the columns are now.
    scale = scale.to(torch.float16).float().clamp(min=torch.finfo(torch.float16).tiny)
    steps = (basis.float() / scale).round().clamp(-_STEPS, _STEPS)
    return (steps * scale).to(basis.dtype)


def stored_bytes(artifact: RankArtifact, ratios: Sequence[float], bits: int) -> int:
    """Bytes of means, weights and bases with the columns that plans of `ratios` read."""
    total = 0
    for section in artifact.sections.values():
        rows = section.basis.shape[0]
        columns = max(section.plans[ratio].rank for ratio in ratios)
        vectors = 1 if section.weights is None else 2
        total += 4 * vectors * rows + rows * columns * bits // 8
        total += 2 * columns if bits == 8 else 0
    return total


def change(
    row: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[float, tuple[float, float]]:
    """KL less that of the same artifact with 16 bits, document by document; and its interval."""
    name = row["artifact"].partition(",")[0]
    reference = next(
        other
        for other in rows
        if other["artifact"] == f"{name}, 16 bits" and other["target_ratio"] == row["target_ratio"]
    )
    pairs = zip(row["by_document"], reference["by_document"], strict=True)
    differences = [own - other for own, other in pairs]
    low, high = interval(differences)
    return round(sum(differences) / len(differences), 6), (round(low, 6), round(high, 6))


if __name__ == "__main__":
    main()
