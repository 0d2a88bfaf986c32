"""What the fast way's rounding costs in KL and in bytes, beside the reference on the same chunks.

    python -m benchmarks.codec_kl --model DIR --data DIR --artifact NAME=DIR [--artifact NAME=DIR]
                                  [--ratios 8,16] [--count 4]
                                  [--out benchmarks/results/codec-kl.json]

As `benchmarks.sensitivity`, on its first documents, of part 2: nothing is reported as quality here,
and nothing was chosen by it. `kl_to_reference` is KL over the reference's on the same documents,
with an interval of 95 % over documents.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, PREFIX, ROOT, SCORED, documents
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import compute_prefix, kl, round_trip, score
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.cpu.codec import CpuCodec
from kvtc_vllm.codec.registry import open_codec

Key = tuple[str, float, str]
"""Artifact, target ratio, way."""
DRAWS = 2000


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.codec_kl", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--ratios", default="8,16", help="target ratios")
    parser.add_argument("--count", type=int, default=4, help="documents")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/codec-kl.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    codecs: dict[Key, ChunkCodec] = {}
    for name, _, directory in (text.partition("=") for text in args.artifact):
        artifact = load_rank_artifact(Path(directory), 0)[0]
        for ratio in map(float, args.ratios.split(",")):
            for way, fast in (("reference", False), ("fast", True)):
                codecs[name, ratio, way] = open_codec(
                    artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio, fast=fast
                )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found: dict[Key, list[float]] = {key: [] for key in codecs}
    stored = dict.fromkeys(codecs, 0)
    names = []
    raw = 0
    for name, ids in islice(documents(args.data, tokenizer, "tune"), args.count):
        prefix = compute_prefix(model, name, ids, PREFIX, SCORED)
        names.append(name)
        raw += prefix.k.nbytes + prefix.v.nbytes
        for key, codec in codecs.items():
            taken, k, v = round_trip(codec, prefix.k, prefix.v, CHUNK)
            stored[key] += taken
            found[key].append(kl(prefix.exact, score(model, ids, k, v, SCORED)))
        print(name, flush=True)
    rows = []
    for key, codec in codecs.items():
        row: dict[str, Any] = dict(zip(("artifact", "target_ratio", "way"), key, strict=True))
        row["real_ratio"] = round(raw / stored[key], 3)
        row["kl"] = round(sum(found[key]) / len(names), 6)
        if isinstance(codec, CpuCodec):
            row["products"] = codec.arithmetic.partition(" of ")[2]
            row["kl_to_reference"] = quotient(found[key], found[*key[:2], "reference"])
        print(row)
        rows.append(row)
    result = {
        "command": "python -m benchmarks.codec_kl --model DIR --data DIR "
        + " ".join(f"--artifact {name}=DIR" for name in dict.fromkeys(key[0] for key in codecs))
        + f" --ratios {args.ratios} --count {args.count}",
        "documents": names,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def quotient(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of sums over the same documents: [itself, low, high]."""
    chance = random.Random(0)
    drawn = []
    for _ in range(DRAWS):
        own = chance.choices(range(len(values)), k=len(values))
        drawn.append(sum(values[i] for i in own) / sum(base[i] for i in own))
    drawn.sort()
    low, high = drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]
    return [round(x, 3) for x in (sum(values) / sum(base), low, high)]


if __name__ == "__main__":
    main()
