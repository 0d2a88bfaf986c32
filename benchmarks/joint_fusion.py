"""Joint Encoding's fusion of KV blocks: bytes, KL, and its Poisson model against counted fusions.

    python -m benchmarks.joint_fusion --model DIR --data DIR --artifact DIR
                                      [--count N] [--out benchmarks/results/joint_fusion.json]

Documents and scores are those of `benchmarks.sensitivity`: 768 tokens of prefix go through a
method and back, 128 exact tokens follow, KL is over the next 128. The batch form fuses blocks of
different documents, the chunk form those of one document. All bytes are counted: directions and
the first and last two layers in 16 bits, norms, indexes. `blocks_kept` is what the paper counts,
blocks over blocks kept in the fused layers. kvtc is our codec on the same prefixes.

The model: cosines of blocks of two documents are taken as normal, so a pair is above a threshold
with probability q; fusions of a block with any of the other document's n are a Poisson process, so
it is fused with probability 1 - exp(-n q). Predicted and counted are sums over all pairs of
documents and all fused layers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, ROOT, documents
from benchmarks.sensitivity_texts import PREFIX, SCORED
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import (
    Prefix,
    compute_prefix,
    interval,
    kl,
    round_trip,
    score,
)
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.evaluation.baselines.formats import pack_positions
from kvtc_vllm.evaluation.baselines.joint_fusion import (
    BLOCK_TOKENS,
    EXACT_LAYERS,
    Alike,
    JointFusion,
    JointFusionStrict,
    fuse,
)

THRESHOLDS = (0.75, 0.85, 0.95)
MODEL_THRESHOLDS = tuple(round(0.3 + 0.05 * n, 2) for n in range(14))
BLOCKS = PREFIX // BLOCK_TOKENS
Restored = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of every document, as in `Prefix`."""


def main() -> None:
    """Measure, print a table, write JSON and a plot beside it."""
    parser = argparse.ArgumentParser(prog="benchmarks.joint_fusion", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", type=Path, required=True, help="to compare with")
    parser.add_argument("--count", type=int, default=10, help="documents")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/joint_fusion.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = list(documents(args.data, tokenizer, "report"))[: args.count]
    prefixes = [compute_prefix(model, name, ids, PREFIX, SCORED) for name, ids in found]
    artifact = load_rank_artifact(args.artifact, 0)[0]
    rows = measure(model, prefixes, artifact)
    predictions = poisson(prefixes)
    result = {
        "command": "python -m benchmarks.joint_fusion --model DIR --data DIR --artifact DIR "
        f"--count {args.count}",
        "model": args.model.name,
        "documents": [prefix.name for prefix in prefixes],
        "prefix_tokens": PREFIX,
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
        "rows": rows,
        "poisson": predictions,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(predictions, args.out.with_suffix(".png"))


def measure(model: Any, prefixes: Sequence[Prefix], artifact: RankArtifact) -> list[dict[str, Any]]:
    """A row per method."""
    raw = sum(prefix.k.nbytes + prefix.v.nbytes for prefix in prefixes)
    dtype = prefixes[0].k.dtype
    methods: dict[str, Any] = {
        **{f"batch {t:g}": partial(batch_form, alike=partial(above, t)) for t in THRESHOLDS},
        "batch strict": partial(batch_form, alike=JointFusionStrict.alike),
        "chunk 0.75": partial(chunk_form, method=JointFusion(artifact.geometry, dtype)),
        "chunk strict": partial(chunk_form, method=JointFusionStrict(artifact.geometry, dtype)),
        **{
            f"kvtc {ratio:g}x": partial(
                by_codec, codec=open_codec("kvtc", dtype, artifact=artifact, ratio=ratio)
            )
            for ratio in (8.0, 16.0, 32.0)
        },
    }
    rows = []
    for name, method in methods.items():
        stored, restored, kept = method(prefixes)
        divergence = [
            kl(prefix.exact, score(model, prefix.ids, k, v, SCORED))
            for prefix, (k, v) in zip(prefixes, restored, strict=True)
        ]
        rows.append(
            {
                "method": name,
                "real_ratio": round(raw / stored, 3),
                "blocks_kept": kept,
                "kl": round(sum(divergence) / len(divergence), 6),
                "interval": [round(value, 6) for value in interval(divergence)],
            }
        )
        print(rows[-1], flush=True)
    return rows


def above(
    threshold: float, cosines: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """The paper's test."""
    return cosines > threshold


def batch_form(prefixes: Sequence[Prefix], alike: Alike) -> tuple[int, Restored, float | None]:
    """Bytes, what comes back, and blocks over blocks kept, a leaf per document."""
    restored = [(prefix.k.clone(), prefix.v.clone()) for prefix in prefixes]
    layers = range(prefixes[0].k.shape[1])
    fused_layers = layers[EXACT_LAYERS : len(layers) - EXACT_LAYERS]
    total = len(prefixes) * BLOCKS
    kept = 0
    exact_layers = len(layers) - len(fused_layers)
    stored = exact_layers * sum(p.k[:, 0].nbytes + p.v[:, 0].nbytes for p in prefixes)
    for layer in fused_layers:
        keys, values = (_rows(prefixes, which, layer) for which in ("k", "v"))
        fused = fuse(keys, values, [BLOCKS] * len(prefixes), alike)
        kept += len(fused.keys)
        stored += 2 * (fused.keys.numel() + fused.values.numel())
        stored += len(pack_positions(fused.of_block, total)) + 2 * 4 * total
        for pair, directions, rows in ((0, fused.keys, keys), (1, fused.values, values)):
            shared = directions.to(torch.bfloat16).float()[fused.of_block]
            back = (shared * rows.norm(dim=1, keepdim=True)).to(torch.bfloat16)
            for number, part in enumerate(back.view(len(prefixes), PREFIX, -1)):
                target = restored[number][pair][:, layer]
                target.copy_(part.view(target.shape))
    return stored, restored, round(total * len(fused_layers) / kept, 3)


def chunk_form(
    prefixes: Sequence[Prefix], method: JointFusion
) -> tuple[int, Restored, float | None]:
    """The same of the bench's baseline, which is of one document."""
    stored, restored = 0, []
    for prefix in prefixes:
        parts = method.compress(prefix.k, prefix.v, 0)
        stored += sum(map(len, parts))
        restored.append(method.restore([memoryview(part) for part in parts], PREFIX, 0))
    return stored, restored, None


def by_codec(prefixes: Sequence[Prefix], codec: Any) -> tuple[int, Restored, float | None]:
    """The same of a codec of chunks."""
    stored, restored = 0, []
    for prefix in prefixes:
        taken, k, v = round_trip(codec, prefix.k, prefix.v, CHUNK)
        stored += taken
        restored.append((k, v))
    return stored, restored, None


def poisson(prefixes: Sequence[Prefix]) -> list[dict[str, float]]:
    """Fusions of two documents, predicted and counted, by threshold."""
    layers = prefixes[0].k.shape[1]
    counted = dict.fromkeys(MODEL_THRESHOLDS, 0)
    predicted = dict.fromkeys(MODEL_THRESHOLDS, 0.0)
    blocks = 0
    for layer in range(EXACT_LAYERS, layers - EXACT_LAYERS):
        keys = _rows(prefixes, "k", layer)
        units = (keys / keys.norm(dim=1, keepdim=True)).view(len(prefixes), BLOCKS, -1)
        cosines = torch.stack(
            [
                units[left] @ units[right].T
                for left in range(len(prefixes))
                for right in range(left + 1, len(prefixes))
            ]
        )
        mean, deviation = float(cosines.mean()), float(cosines.std())
        blocks += cosines.shape[0] * BLOCKS
        for threshold in MODEL_THRESHOLDS:
            counted[threshold] += int((cosines > threshold).any(dim=1).sum())
            q = 0.5 * math.erfc((threshold - mean) / deviation / math.sqrt(2))
            predicted[threshold] += cosines.shape[0] * BLOCKS * (1 - math.exp(-BLOCKS * q))
    return [
        {
            "threshold": threshold,
            "predicted_share": round(predicted[threshold] / blocks, 5),
            "counted_share": round(counted[threshold] / blocks, 5),
        }
        for threshold in MODEL_THRESHOLDS
    ]


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Share of blocks that are fused, predicted and counted."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.4))
    thresholds = [row["threshold"] for row in rows]
    axes.plot(thresholds, [row["counted_share"] for row in rows], "o-", label="counted")
    axes.plot(thresholds, [row["predicted_share"] for row in rows], "--", label="Poisson model")
    axes.set_xlabel("threshold on the cosine of keys")
    axes.set_ylabel("share of blocks fused, two documents")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _rows(prefixes: Sequence[Prefix], which: str, layer: int) -> torch.Tensor:
    """float32 [documents * blocks, elements]: a layer's blocks of all documents."""
    parts = [getattr(prefix, which)[:, layer].float().reshape(BLOCKS, -1) for prefix in prefixes]
    return torch.cat(parts)


if __name__ == "__main__":
    main()
