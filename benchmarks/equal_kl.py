"""How many times fewer bytes one artifact takes than another at equal KL, with intervals.

    python -m benchmarks.equal_kl FILE:NAME FILE:NAME [--kind KIND]

FILE is a result of `benchmarks.sensitivity` or `benchmarks.step_choices`, NAME an artifact or a
choice in it; the base comes first. Both must be measured on the same documents. For every ratio of
the base the other's ratio of the same KL is read off between its own, in logarithms. Intervals are
95 %, of documents drawn again for both together. Beyond the other's ratios nothing is told.
KIND is a kind of text of a result that has several (`--kinds` there). Of other results it takes the
documents whose names begin so, such as essay; ratios stay those of all documents.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtc_vllm.calibration.cache_replay import RESAMPLES


@dataclass(frozen=True)
class Curve:
    """documents: of the whole result. ratios: real ones, rising. kls: float64 [ratios, n], of the
    documents that were chosen."""

    documents: Sequence[str]
    ratios: Sequence[float]
    kls: torch.Tensor

    def ratio_at(self, kl: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Of mean KLs [n] over documents of numbers [n, m]: ratios [n].

        0 for a KL below all of the curve, infinity above.
        """
        means = self.kls[:, drawn].mean(-1).log()
        target = kl.log()
        sizes = torch.tensor(self.ratios, dtype=torch.float64).log()
        found = torch.where(target < means[0], -math.inf, math.inf).double()
        for i in range(len(sizes) - 1):
            low, high = means[i], means[i + 1]
            there = (low <= target) & (target <= high)
            share = (target - low) / (high - low)
            found = torch.where(there, sizes[i] + share * (sizes[i + 1] - sizes[i]), found)
        return found.exp()


def read_curve(text: str, kind: str | None = None) -> Curve:
    """FILE:NAME. kind: of text, where the file has several.

    Raises SystemExit for a name or a kind that is not in the file.
    """
    path, _, name = text.partition(":")
    result = json.loads(Path(path).read_text())
    rows = [row for row in result["rows"] if name in (row.get("artifact"), row.get("choice"))]
    if not rows:
        raise SystemExit(f"{path}: has no artifact or choice {name!r}")
    kinds = sorted({row["kind"] for row in rows if "kind" in row})
    names = result["documents"]
    chosen: Sequence[int] = range(len(names))
    if kinds:
        if kind not in kinds:
            raise SystemExit(f"{path}: has no kind of text {kind!r}; it has {', '.join(kinds)}")
        rows = [row for row in rows if row["kind"] == kind]
        chosen = range(len(rows[0]["by_document"]))
    elif kind is not None:
        chosen = [number for number, name in enumerate(names) if name.startswith(kind)]
        if not chosen:
            raise SystemExit(f"{path}: no document's name begins with {kind!r}: {names}")
        names = [names[number] for number in chosen]
    rows.sort(key=lambda row: float(row["real_ratio"]))
    kls = torch.tensor([row["by_document"] for row in rows], dtype=torch.float64)
    return Curve(names, [row["real_ratio"] for row in rows], kls[:, list(chosen)])


@dataclass(frozen=True)
class Factor:
    """At one ratio of the base. ratio: of the other at the same KL; infinity or 0: beyond its own.

    value: times fewer bytes; low, high: 95 %.
    """

    base_ratio: float
    kl: float
    ratio: float
    value: float
    low: float
    high: float


def factors(base: Curve, other: Curve) -> list[Factor]:
    """A factor for every ratio of the base. Raises SystemExit for other documents."""
    if base.documents != other.documents or base.kls.shape[1] != other.kls.shape[1]:
        raise SystemExit("the two were measured on different documents")
    count = base.kls.shape[1]
    every = torch.arange(count)[None]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    found = []
    for ratio, of_documents in zip(base.ratios, base.kls, strict=True):
        kl = of_documents.mean()
        there = float(other.ratio_at(kl[None], every))
        sampled = other.ratio_at(of_documents[drawn].mean(-1), drawn) / ratio
        # Of draws beyond the curve it is known that they are, not how far.
        low, high = (float(sampled.quantile(q, interpolation="nearest")) for q in (0.025, 0.975))
        found.append(Factor(ratio, float(kl), there, there / ratio, low, high))
    return found


def main() -> None:
    """Print a line per ratio of the base."""
    parser = argparse.ArgumentParser(prog="benchmarks.equal_kl", description=__doc__)
    parser.add_argument("base", metavar="FILE:NAME")
    parser.add_argument("other", metavar="FILE:NAME")
    parser.add_argument("--kind", help="of text")
    args = parser.parse_args()
    for at in factors(read_curve(args.base, args.kind), read_curve(args.other, args.kind)):
        line = f"{at.base_ratio:g}x, KL {at.kl:.5f}: "
        if 0 < at.ratio < math.inf:
            print(f"{line}{at.ratio:.1f}x, {at.value:.2f} [{at.low:.2f}, {at.high:.2f}]")
        else:
            print(f"{line}beyond the other's ratios")


if __name__ == "__main__":
    main()
