"""What of a token's K and V could be told from what a reader has anyway: bits at equal error.

    python -m benchmarks.redundancy --model DIR --data DIR --artifact DIR
                                    [--out benchmarks/results/redundancy.json]

Rows are those of codec 2: K before RoPE and V of all layers, weighted as the artifact weights
them, without marked tokens. A model of them is fitted on documents of the calibration part, and
bits are counted on documents of the tuning part: what an ideal coder takes of coefficients with
the variances found there, every one coded to the same error, at rates that are chosen on the
calibration rows (reverse water filling). Every form is compared with two bases at the same error
on the same rows.

- two bases: one of K, one of V, as the paper.
- V from K: leading coefficients of K predict V, linearly; what is left has a basis.
- one basis: of rows in which V follows K. What codec 2 calls a shared basis.
- token ids: the embeddings of a token and of the one before it predict its K and V, linearly.
- previous token: leading coefficients of the row before predict K and V, linearly.

Predictions are from exact values; a reader has coded ones, so the last two and the second are
better here than they could be.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity_texts import texts
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import compute_prefix
from kvtc_vllm.codec.artifact import APART, RankArtifact
from kvtc_vllm.codec.transform import centred_rows, chunk_rows
from kvtc_vllm.evaluation.data.public import Source

ROOT = Path(__file__).resolve().parents[1]
KINDS_OF_TEXT = ("essays", "library", "maths", "kv-retrieval")
RATES = (2000, 3000, 4000, 6000, 9000, 13000, 19000, 28000)
"""Bits per token, on calibration rows."""
BELOW = 2
"""How many of them are there to read off from alone: other forms need fewer bits."""
LEADING = 768
RIDGE = 0.01
"""Of the mean square of the features."""


@dataclass(frozen=True)
class Tokens:
    """k, v: weighted rows, float32 [T, p]. ids: of each token and the one before it, int64 [T, 2].
    previous: number of the row before, int64 [T]; -1 where there is none."""

    k: torch.Tensor
    v: torch.Tensor
    ids: torch.Tensor
    previous: torch.Tensor


Rows = dict[str, torch.Tensor]
"""Name of a basis -> rows float32 [T, p] that it codes."""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.redundancy", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", type=Path, required=True, help="one of kvtc2, two bases")
    parser.add_argument("--documents", type=int, default=16, help="of each kind, to fit on")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/redundancy.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    artifact = load_rank_artifact(args.artifact, 0)[0]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = [Source(str(args.data), part) for part in ("calibrate", "tune")]
    fitted, unseen = (
        read_tokens(model, tokenizer, artifact, source, documents)
        for source, documents in zip(sources, (args.documents, args.documents // 4), strict=True)
    )
    embeddings = model.get_input_embeddings().weight.detach().float()
    del model
    base: list[tuple[float, float]] = []
    found: dict[str, list[float]] = {}
    for name, pair in forms(fitted, unseen, embeddings):
        curve = rates(*pair)
        base = base or curve[BELOW:]
        found[name] = [bits_at(curve, error) / bits for bits, error in base]
        print(f"{name:16}", *(f"{share:.3f}" for share in found[name]), flush=True)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.redundancy --model DIR --data DIR --artifact DIR "
        f"--documents {args.documents}",
        "model": args.model.name,
        "artifact": artifact.fingerprint.hex(),
        "tokens": {"fitted": len(fitted.k), "counted": len(unseen.k)},
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "bits over those of two bases at the same error",
        "bits of two bases": [round(bits) for bits, _ in base],
        "shares": {name: [round(share, 4) for share in own] for name, own in found.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def read_tokens(
    model: Any, tokenizer: Any, artifact: RankArtifact, source: Source, documents: int
) -> Tokens:
    """Rows of the prefixes of documents of every kind, exact and marked tokens left out."""
    k: list[torch.Tensor] = []
    v: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    previous: list[torch.Tensor] = []
    rows = 0
    for text in texts(tokenizer, source, KINDS_OF_TEXT, documents, documents):
        prefix = compute_prefix(model, text.name, text.ids, text.prefix, 1)
        kept = torch.ones(len(prefix.k), dtype=torch.bool)
        if artifact.sink_rule is not None:
            kept = ~artifact.sink_rule.marks(prefix.v)
        kept[: max(1, artifact.sink_tokens)] = False
        chosen = kept.nonzero().flatten()
        positions = torch.arange(len(prefix.k))
        for tensor, name in zip((k, v), APART, strict=True):
            own = chunk_rows(prefix.k, prefix.v, 0, name, artifact, positions)
            tensor.append(centred_rows(own, artifact.sections[0, name])[kept].half())
        tokens = torch.tensor(list(text.ids[: len(kept)]))
        ids.append(torch.stack([tokens[chosen], tokens[chosen - 1]], dim=1))
        place = torch.full((len(kept),), -1)
        place[chosen] = rows + torch.arange(len(chosen))
        previous.append(place[chosen - 1])
        rows += len(chosen)
    return Tokens(torch.cat(k).float(), torch.cat(v).float(), torch.cat(ids), torch.cat(previous))


def forms(
    fitted: Tokens, unseen: Tokens, embeddings: torch.Tensor
) -> Iterator[tuple[str, tuple[Rows, Rows]]]:
    """Names, and rows of both sets as each form codes them. The first is what others are over."""
    yield "two bases", ({"k": fitted.k, "v": fitted.v}, {"k": unseen.k, "v": unseen.v})
    of_keys = leading(fitted.k)
    keys = [tokens.k @ of_keys for tokens in (fitted, unseen)]
    yield "V from K", left_of(fitted, unseen, keys, ("v",))
    centre = embeddings.mean(0)
    words = [
        torch.cat([embeddings[tokens.ids[:, i]] - centre for i in range(2)], dim=1)
        for tokens in (fitted, unseen)
    ]
    yield "token ids", left_of(fitted, unseen, words, ("k", "v"))
    of_values = leading(fitted.v)
    before = []
    for tokens, own in zip((fitted, unseen), keys, strict=True):
        row = torch.cat([own, tokens.v @ of_values], dim=1)
        row = torch.cat([row, torch.zeros(1, row.shape[1])])
        before.append(row[tokens.previous])
    yield "previous token", left_of(fitted, unseen, before, ("k", "v"))
    both = [{"kv": torch.cat([tokens.k, tokens.v], dim=1)} for tokens in (fitted, unseen)]
    yield "one basis", (both[0], both[1])


def left_of(
    fitted: Tokens, unseen: Tokens, features: Sequence[torch.Tensor], names: Sequence[str]
) -> tuple[Rows, Rows]:
    """K and V without what features [T, n] of both sets predict of those that are named."""
    solved = {name: regression(features[0], getattr(fitted, name)) for name in names}
    left: list[Rows] = []
    for tokens, own in zip((fitted, unseen), features, strict=True):
        rows = {"k": tokens.k, "v": tokens.v}
        left.append({n: x - own @ solved[n] if n in solved else x for n, x in rows.items()})
    return left[0], left[1]


def leading(rows: torch.Tensor) -> torch.Tensor:
    """Leading principal directions of centred rows: float32 [p, LEADING]."""
    return torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors[:, -LEADING:]


def regression(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Ridge regression, float32 [n, p]."""
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, features.T @ rows)


def rates(fitted: Rows, unseen: Rows) -> list[tuple[float, float]]:
    """For every one of `RATES`: bits per token and squared error on unseen rows."""
    known, true = [], []
    for name, rows in fitted.items():
        mean = rows.mean(0)
        values, basis = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        known.append(values.clamp_min(0).double())
        true.append(((unseen[name] - mean) @ basis).square().mean(0).double())
    variance, found = torch.cat(known), torch.cat(true)
    curve = []
    for rate in RATES:
        error = water_level(variance, rate)
        live = variance > error
        bits = (0.5 * (found[live] / error).log2()).clamp_min(0).sum()
        left = found[~live].sum() + found[live].clamp_max(error).sum()
        curve.append((float(bits), float(left)))
    return curve


def water_level(variance: torch.Tensor, rate: float) -> float:
    """The error of every coded coefficient at which all take `rate` bits."""
    low, high = 1e-12, float(variance.max())
    for _ in range(80):
        level = math.sqrt(low * high)
        if float((0.5 * (variance / level).log2()).clamp_min(0).sum()) > rate:
            low = level
        else:
            high = level
    return high


def bits_at(curve: Sequence[tuple[float, float]], error: float) -> float:
    """Read off between a curve's points, errors in logarithms. Raises ValueError beyond them."""
    points = sorted((error, bits) for bits, error in curve)
    for (first, more), (second, fewer) in pairwise(points):
        if first <= error <= second:
            share = math.log(error / first) / math.log(second / first)
            return more + share * (fewer - more)
    raise ValueError(f"error {error:.3g} is beyond {points[0][0]:.3g} to {points[-1][0]:.3g}")


if __name__ == "__main__":
    main()
