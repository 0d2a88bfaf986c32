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
is chosen on those. `--kinds` takes others: documents of tasks of `kvtc eval`, with a row for each
kind of text (`benchmarks.sensitivity_texts`); rows of other kinds that are in OUT stay there.

`--halvings N` also turns every blob into the next smaller ones, N times, as a tier under pressure
does, and names these rows after how often that was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity_texts import PREFIX, SCORED, WINDOW, Text, texts
from kvtc_vllm.artifact.card import cache_groups
from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact
from kvtc_vllm.calibration.cache_replay import compute_prefix, interval, kl, round_trip, score
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.base import Blob, ChunkCodec, Coder, DecodedChunk
from kvtc_vllm.codec.cpu.requantise import Requantiser
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY, Kvtc2Codec
from kvtc_vllm.evaluation.data.public import Part as Split
from kvtc_vllm.evaluation.data.public import Source

ROOT = Path(__file__).resolve().parents[1]
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
        metavar="NAME=DIR[:RATIOS]",
        help="an artifact and what to call it, with target ratios of its own; as often as needed",
    )
    parser.add_argument(
        "--ratios", default="8,16,32,64", help="target ratios, of artifacts without their own"
    )
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens per chunk")
    parser.add_argument("--part", choices=("tune", "report"), default="report")
    parser.add_argument("--kinds", help="such as essays,library,kv-retrieval,essay-chats")
    parser.add_argument("--documents", type=int, default=8, help="of each of --kinds")
    parser.add_argument("--halvings", type=int, default=0, help="of blobs of artifacts for it")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/sensitivity.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = [parse_artifact(text, args.ratios) for text in args.artifact]
    artifacts = {name: read_parts(directory) for name, directory, _ in chosen}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source = Source(str(args.data), args.part)
    kinds = args.kinds.split(",") if args.kinds else []
    found = (
        texts(tokenizer, source, kinds, args.documents, args.documents)
        if kinds
        else of_one_length(args.data, tokenizer, args.part)
    )
    codecs = {
        (way, ratio): codec
        for name, _, ratios in chosen
        for ratio in ratios
        for way, codec in ways(name, artifacts[name], ratio, args.halvings).items()
    }
    result: dict[str, Any] = {
        "command": command(args),
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
    documents_before, others = kept_kinds(args.out, result, kinds)
    rows: list[dict[str, Any]] = []
    # After every document: the whole takes long on a small machine.
    for names, rows in measure(model, found, codecs, args.chunk):
        finished = result | {"documents": documents_before + names, "rows": others + rows}
        args.out.write_text(json.dumps(finished, indent=1) + "\n")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row.get('kind', ''):14} {row['artifact']:12} {row['target_ratio']:g}x: "
            f"real {row['real_ratio']:.1f}, "
            f"KL {row['kl']:.5f} [{low:.5f}, {high:.5f}]"
        )


def kept_kinds(
    out: Path, result: dict[str, Any], kinds: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Documents and rows of other kinds of text in OUT, whose commands go into `result`.

    Raises SystemExit if they were measured in another way.
    """
    if not kinds or not out.exists():
        return [], []
    before = json.loads(out.read_text())
    differing = [k for k, v in result.items() if k != "command" and before.get(k) != v]
    if differing:
        raise SystemExit(f"{out}: was measured with another {differing[0]}; give another --out")
    if any(row.get("kind") in kinds for row in before["rows"]):
        raise SystemExit(f"{out}: has rows of {', '.join(kinds)}; give another --out")
    result["command"] = f"{before['command']}; {result['command']}"
    return before["documents"], before["rows"]


def parse_artifact(text: str, ratios: str) -> tuple[str, Path, list[float]]:
    """Name, directory and target ratios of NAME=DIR[:RATIOS]; `ratios` where it gives none."""
    name, _, rest = text.partition("=")
    directory, _, own = rest.partition(":")
    return name, Path(directory), [float(ratio) for ratio in (own or ratios).split(",")]


def command(args: argparse.Namespace) -> str:
    """For the results: with all that decides figures, and no paths."""
    parts = ["python -m benchmarks.sensitivity --model DIR --data DIR"]
    for text in args.artifact:
        name, _, rest = text.partition("=")
        _, colon, own = rest.partition(":")
        parts.append(f"--artifact {name}=DIR{colon}{own}")
    parts.append(f"--ratios {args.ratios} --chunk {args.chunk}")
    if args.part != "report":
        parts.append(f"--part {args.part}")
    if args.kinds:
        parts.append(f"--kinds {args.kinds} --documents {args.documents}")
    if args.halvings:
        parts.append(f"--halvings {args.halvings}")
    return " ".join(parts)


@dataclass(frozen=True)
class Part:
    """Of an artifact, for one cache group. layers: of the model, in order."""

    layers: Sequence[int]
    artifact: RankArtifact

    def codec(self, ratio: float) -> ChunkCodec:
        """That serves on a CPU."""
        artifact = self.artifact
        return open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio)


class Halved(Coder):
    """Blobs of a top level, halved some times: `encode` and `decode` as the codec has them."""

    def __init__(self, top: Kvtc2Codec, requantiser: Requantiser, times: int) -> None:
        self._top = top
        self._requantiser = requantiser
        self._times = times

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """One chunk. Raises CodecError for what is not stored."""
        blob = self._top.encode(k, v, start, key)
        for _ in range(self._times):
            blob = self._requantiser.halve(blob, key)
        return blob

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """Inverse of `encode`; plans of all levels are in the artifact."""
        return self._top.decode(blob, expect_start, expect_tokens, key)


Coders = list[tuple[Sequence[int], Coder]]
"""Layers, and what codes them."""


def ways(name: str, parts: Sequence[Part], ratio: float, halvings: int) -> dict[str, Coders]:
    """By name: the artifact at one ratio, and its blobs halved once, twice and so on.

    Raises ArtifactError for an artifact without plans for halving.
    """
    found: dict[str, Coders] = {name: [(part.layers, part.codec(ratio)) for part in parts]}
    for times in range(1, halvings + 1):
        halved: Coders = []
        for layers, codec in found[name]:
            assert isinstance(codec, Kvtc2Codec)
            halved.append((layers, Halved(codec, Requantiser(codec, ENTROPY), times)))
        found[f"{name} halved {times}"] = halved
    return found


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
    parts: Coders, k: torch.Tensor, v: torch.Tensor, chunk: int
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
    found: Iterable[Text],
    codecs: Mapping[tuple[str, float], Coders],
    chunk: int,
) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """After every document: names so far, and a row per kind of text, way and ratio."""
    totals: dict[tuple[str, str, float], Total] = {}
    names: list[str] = []
    for text in found:
        started = time.monotonic()
        # Of documents of tasks the last token is a target alone.
        ids = text.ids[:-1] if text.kind else text.ids
        prefix = compute_prefix(model, text.name, ids, text.prefix, text.scored)
        names.append(text.name)
        for (way, ratio), parts in codecs.items():
            taken, k, v = through(parts, prefix.k, prefix.v, chunk)
            total = totals.setdefault((text.kind, way, ratio), Total())
            total.raw += prefix.k.nbytes + prefix.v.nbytes
            total.stored += taken
            total.divergence.append(kl(prefix.exact, score(model, ids, k, v, text.scored)))
        print(f"{text.name}: {time.monotonic() - started:.0f} s", flush=True)
        yield names, [row(*key, total) for key, total in totals.items()]


@dataclass
class Total:
    """Bytes of all documents, and the KL of each."""

    raw: int = 0
    stored: int = 0
    divergence: list[float] = field(default_factory=list)


def row(kind: str, name: str, ratio: float, total: Total) -> dict[str, Any]:
    """Of one artifact at one ratio, on documents of one kind. kind: empty where there is one."""
    divergence = total.divergence
    low, high = interval(divergence)
    return {
        **({"kind": kind} if kind else {}),
        "artifact": name,
        "target_ratio": ratio,
        "real_ratio": round(total.raw / total.stored, 2),
        "bytes": total.stored,
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


def of_one_length(data: Path, tokenizer: Any, split: Split) -> Iterator[Text]:
    """`documents`, of no kind."""
    for name, ids in documents(data, tokenizer, split):
        yield Text("", name, ids, PREFIX, SCORED)


def _long(
    texts: Iterator[tuple[str, str]], length: int, tokenizer: Any
) -> Iterator[tuple[str, list[int]]]:
    """The first `OF_EACH` that are long enough."""
    encoded = ((name, tokenizer.encode(text)) for name, text in texts)
    return islice(((name, ids[:length]) for name, ids in encoded if len(ids) >= length), OF_EACH)


if __name__ == "__main__":
    main()
