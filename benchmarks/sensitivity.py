"""KL of artifacts of any codec, in real bytes, without an engine.

    python -m benchmarks.sensitivity --model DIR --data DIR --artifact plain=DIR
                                     --artifact weighted=DIR [--artifact NAME=DIR ...]
                                     [--out benchmarks/results/sensitivity.json]

Of every document, transformers computes the first 768 tokens. Their K and V go through the codec
that serves on a CPU, in blobs of `--chunk` tokens, and back. The next 128 tokens are computed
exactly on what came back, as the recent window is; over the 128 after them, the predictions are
compared with those on the uncompressed cache. Ratios are of whole blobs, headers and sinks
included; intervals are 95 %, bootstrapped over documents. An artifact with parts for several cache
groups codes the layers of each by its part, and all 768 tokens, also those that a window has left.

`--data` has essays.jsonl.gz and gsm8k-test.jsonl. Documents are those whose number modulo 4 is 3,
which no calibration and no tuning uses: five essays that are long enough, and five times ten
GSM8K problems, 1,024 tokens of each. With `--part tune` the number modulo 4 is 2: what is chosen
is chosen on those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtc_vllm.artifact.card import cache_groups
from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact
from kvtc_vllm.calibration.cache_replay import compute_prefix, interval, kl, round_trip, score
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.evaluation.data.public import Part as Split
from kvtc_vllm.evaluation.data.public import Source

ROOT = Path(__file__).resolve().parents[1]
PREFIX, WINDOW, SCORED = 768, 128, 128
CHUNK = 128
OF_EACH = 5
PROBLEMS = 10


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.sensitivity", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument(
        "--artifact",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="an artifact and what to call it; as often as needed",
    )
    parser.add_argument("--ratios", default="8,16,32,64", help="target ratios, of all artifacts")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens per chunk")
    parser.add_argument("--part", choices=("tune", "report"), default="report")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sensitivity.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    named = [text.partition("=") for text in args.artifact]
    artifacts = {name: read_parts(Path(directory)) for name, _, directory in named}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.sensitivity --model DIR --data DIR "
        + " ".join(f"--artifact {name}=DIR" for name in artifacts)
        + f" --ratios {args.ratios} --chunk {args.chunk}"
        + ("" if args.part == "report" else f" --part {args.part}"),
        "model": args.model.name,
        "artifacts": {
            name: " ".join(part.artifact.fingerprint.hex() for part in parts)
            for name, parts in artifacts.items()
        },
        "codecs": {name: parts[0].artifact.codec for name, parts in artifacts.items()},
        "prefix_tokens": PREFIX,
        "exact_tokens": WINDOW,
        "scored_tokens": SCORED,
        "chunk_tokens": args.chunk,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    # After every document: the whole takes long on a small machine.
    for names, rows in measure(
        model, tokenizer, args.data, artifacts, ratios, args.chunk, args.part
    ):
        finished = result | {"documents": names, "rows": rows}
        args.out.write_text(json.dumps(finished, indent=1) + "\n")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['artifact']:12} {row['target_ratio']:g}x: real {row['real_ratio']:.1f}, "
            f"KL {row['kl']:.5f} [{low:.5f}, {high:.5f}]"
        )


@dataclass(frozen=True)
class Part:
    """Of an artifact, for one cache group. layers: of the model, in order."""

    layers: Sequence[int]
    artifact: RankArtifact

    def codec(self, ratio: float) -> ChunkCodec:
        """That serves on a CPU."""
        artifact = self.artifact
        return open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio)


def one_part(artifact: RankArtifact) -> list[Part]:
    """All layers of a model with one cache group."""
    return [Part(range(artifact.geometry.num_layers), artifact)]


def read_parts(directory: Path) -> list[Part]:
    """An artifact of one rank; of a model with one cache group it has one part."""
    first, card, _ = load_rank_artifact(directory, 0)
    groups = cache_groups(card)
    if not groups:
        return one_part(first)
    return [
        Part(group.layers, load_rank_artifact(group_directory(directory, number), 0)[0])
        for number, group in enumerate(groups)
    ]


def through(
    parts: Sequence[tuple[Sequence[int], ChunkCodec]], k: torch.Tensor, v: torch.Tensor, chunk: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Bytes of all blobs, and the K and V that they hold; parts: layers, and what codes them.

    k, v: [T, L, H, D] from position 0 on, of all layers.
    """
    stored, back_k, back_v = 0, torch.empty_like(k), torch.empty_like(v)
    for layers, codec in parts:
        own = list(layers)
        taken, back_k[:, own], back_v[:, own] = round_trip(codec, k[:, own], v[:, own], chunk)
        stored += taken
    return stored, back_k, back_v


def measure(
    model: Any,
    tokenizer: Any,
    data: Path,
    artifacts: dict[str, list[Part]],
    ratios: Sequence[float],
    chunk: int,
    split: Split = "report",
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """After every document: names so far, and a row per artifact and ratio."""
    codecs = {
        (name, ratio): [(part.layers, part.codec(ratio)) for part in parts]
        for name, parts in artifacts.items()
        for ratio in ratios
    }
    stored = dict.fromkeys(codecs, 0)
    divergence: dict[tuple[str, float], list[float]] = {key: [] for key in codecs}
    names: list[str] = []
    raw = 0
    for name, ids in documents(data, tokenizer, split):
        started = time.monotonic()
        prefix = compute_prefix(model, name, ids, PREFIX, SCORED)
        names.append(name)
        raw += prefix.k.nbytes + prefix.v.nbytes
        for key, parts in codecs.items():
            taken, k, v = through(parts, prefix.k, prefix.v, chunk)
            stored[key] += taken
            divergence[key].append(kl(prefix.exact, score(model, ids, k, v, SCORED)))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        yield names, [row(*key, divergence[key], raw, stored[key]) for key in codecs]


def row(
    name: str, ratio: float, divergence: Sequence[float], raw: int, stored: int
) -> dict[str, Any]:
    """Of one artifact at one ratio. divergence: KL of each document; raw, stored: bytes of all."""
    low, high = interval(divergence)
    return {
        "artifact": name,
        "target_ratio": ratio,
        "real_ratio": round(raw / stored, 2),
        "bytes": stored,
        "kl": round(sum(divergence) / len(divergence), 6),
        "interval": [round(low, 6), round(high, 6)],
        "by_document": [round(value, 6) for value in divergence],
    }


def documents(data: Path, tokenizer: Any, split: Split) -> Iterator[tuple[str, list[int]]]:
    """Names and token ids of documents of one length, essays and problems in turn."""
    length = PREFIX + WINDOW + SCORED
    source = Source(str(data), split)
    prose = (
        (d.name.replace("essays", "essay"), d.content["text"]) for d in source.documents("essays")
    )
    solved = source.documents("gsm8k-test")
    problems = (
        (
            f"{solved[first].name} and on",
            "\n\n".join(
                f"Question: {d.content['question']}\nAnswer: {d.content['answer']}"
                for d in solved[first : first + PROBLEMS]
            ),
        )
        for first in range(0, len(solved), PROBLEMS)
    )
    for pair in zip(
        _long(prose, length, tokenizer), _long(problems, length, tokenizer), strict=False
    ):
        yield from pair


def _long(
    texts: Iterator[tuple[str, str]], length: int, tokenizer: Any
) -> Iterator[tuple[str, list[int]]]:
    """The first `OF_EACH` that are long enough."""
    encoded = ((name, tokenizer.encode(text)) for name, text in texts)
    return islice(((name, ids[:length]) for name, ids in encoded if len(ids) >= length), OF_EACH)


if __name__ == "__main__":
    main()
