"""What it costs to keep the bases of an artifact in 8 bits instead of 16: KL and file size.

    python -m benchmarks.basis_bits --model DIR --data DIR --artifact NAME=DIR
                                    [--artifact NAME=DIR] [--ratios 16,32,64]
                                    [--out benchmarks/results/basis-bits.json]

Every column of every basis is divided by its largest element, rounded to 127 steps of each sign
and multiplied again, as it would be after reading such a file. *by layer*: the elements of each
layer have a scale of their own. *tail*: the leading columns, which carry most of a row, stay in
16 bits. Documents, KL and intervals are those of `benchmarks.sensitivity`. *change* is the
difference to the KL with 16 bits over the same documents, bootstrapped in pairs. Sizes are of
means, weights and those columns that plans of the given ratios read, before any compression.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, ROOT, Coders, Part, measure, of_one_length, one_part
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import interval
from kvtc_vllm.codec.artifact import RankArtifact, SectionKey

LEADING = 128
"""Columns that *tail* keeps in 16 bits."""
_STEPS = 127
_LEAST_SCALE = 2.0**-24
"""The smallest number of float16."""


@dataclass(frozen=True)
class Way:
    """How a basis is kept. leading: columns in 16 bits; None: all. by_layer: scales."""

    name: str
    leading: int | None
    by_layer: bool = False


SIXTEEN = Way("16 bits", None)
WAYS = (
    SIXTEEN,
    Way("8 bits", 0),
    Way("8 bits by layer", 0, by_layer=True),
    Way("8 bits, tail", LEADING),
)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.basis_bits", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument(
        "--artifact", action="append", required=True, metavar="NAME=DIR", help="may be repeated"
    )
    parser.add_argument("--ratios", default="16,32,64", help="target ratios")
    parser.add_argument(
        "--way",
        action="append",
        choices=[way.name for way in WAYS[1:]],
        help="beside 16 bits; may be repeated; default: all",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/basis-bits.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    ways = [way for way in WAYS if way is SIXTEEN or not args.way or way.name in args.way]
    artifacts: dict[str, list[Part]] = {}
    sizes: dict[str, int] = {}
    for named in args.artifact:
        name, _, directory = named.partition("=")
        artifact = load_rank_artifact(Path(directory), 0)[0]
        for way in ways:
            key = f"{name}: {way.name}"
            artifacts[key] = one_part(rounded(artifact, way))
            sizes[key] = stored_bytes(artifact, ratios, way)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.basis_bits --model DIR --data DIR "
        + " ".join(f"--artifact {named.partition('=')[0]}=ARTIFACT" for named in args.artifact)
        + f" --ratios {args.ratios}"
        + "".join(f' --way "{way.name}"' for way in ways if way is not SIXTEEN),
        "model": args.model.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
        "bytes": sizes,
    }
    rows: list[dict[str, Any]] = []
    found = of_one_length(args.data, tokenizer, "report")
    codecs: dict[tuple[str, float], Coders] = {
        (name, ratio): [(part.layers, part.codec(ratio)) for part in parts]
        for name, parts in artifacts.items()
        for ratio in ratios
    }
    for names, rows in measure(model, found, codecs, CHUNK):
        for row in rows:
            row["change"], row["change_interval"] = change(row, rows)
        args.out.write_text(
            json.dumps(result | {"documents": names, "rows": rows}, indent=1) + "\n"
        )
    for row in rows:
        low, high = row["change_interval"]
        print(
            f"{row['artifact']:26} {row['target_ratio']:g}x: real {row['real_ratio']:.2f}, "
            f"KL {row['kl']:.5f}, change {row['change']:+.6f} [{low:+.6f}, {high:+.6f}], "
            f"{sizes[row['artifact']] / 1e6:.1f} MB"
        )


def rounded(artifact: RankArtifact, way: Way) -> RankArtifact:
    """The artifact with every basis rounded and back."""
    sections = {
        key: replace(section, basis=_rounded(section.basis, _blocks(artifact, key, way), way))
        for key, section in artifact.sections.items()
    }
    return replace(artifact, sections=sections)


def _blocks(artifact: RankArtifact, key: SectionKey, way: Way) -> int:
    """Scales per column: of each layer's K and V, which have heads of one size."""
    group, name = key
    first, end = artifact.geometry.layer_groups[group]
    return (end - first) * len(artifact.geometry.row_parts(group, name)) if way.by_layer else 1


def _rounded(basis: torch.Tensor, blocks: int, way: Way) -> torch.Tensor:
    """basis: float16 [p, r]. Scales are kept in float16, as the columns are now."""
    if way.leading is None:
        return basis
    elements = basis.float().reshape(blocks, -1, basis.shape[1])
    largest = elements.abs().amax(dim=1, keepdim=True)
    scale = (largest / _STEPS).to(torch.float16).float().clamp(min=_LEAST_SCALE)
    steps = (elements / scale).round()
    found = (steps.clamp(-_STEPS, _STEPS) * scale).to(basis.dtype).reshape(basis.shape)
    return torch.cat((basis[:, : way.leading], found[:, way.leading :]), dim=1)


def stored_bytes(artifact: RankArtifact, ratios: Sequence[float], way: Way) -> int:
    """Bytes of means, weights and bases with the columns that plans of `ratios` read."""
    total = 0
    for key, section in artifact.sections.items():
        rows = section.basis.shape[0]
        columns = max(section.plans[ratio].rank for ratio in ratios)
        leading = columns if way.leading is None else min(way.leading, columns)
        vectors = 1 if section.weights is None else 2
        total += 4 * vectors * rows + 2 * rows * leading
        total += (columns - leading) * (rows + 2 * _blocks(artifact, key, way))
    return total


def change(
    row: dict[str, Any], rows: Sequence[dict[str, Any]]
) -> tuple[float, tuple[float, float]]:
    """KL less that of the same artifact with 16 bits, document by document; and its interval."""
    name = row["artifact"].partition(":")[0]
    reference = next(
        other
        for other in rows
        if other["artifact"] == f"{name}: {SIXTEEN.name}"
        and other["target_ratio"] == row["target_ratio"]
    )
    pairs = zip(row["by_document"], reference["by_document"], strict=True)
    differences = [own - other for own, other in pairs]
    low, high = interval(differences)
    return round(sum(differences) / len(differences), 6), (round(low, 6), round(high, 6))


if __name__ == "__main__":
    main()
