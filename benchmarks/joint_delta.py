"""Bytes and time of `joint: delta` on traces where texts come again, and where they don't.

    python -m benchmarks.joint_delta --model DIR --data DIR --artifact DIR
                                     [--traces shared,edited,agent,chats] [--ratios 16,32]
                                     [--out benchmarks/results/joint_delta.json]

transformers computes K and V of every prompt. Its chunks go through the codec that serves on a CPU
and into the memory tier, unless a chunk of the same prefix is there already, as in serving. `off`
are the bytes of all blobs, `delta` those that the tier holds with differences, `saved` the share
between them. Every record is read back and compared with its blob: nothing else is decoded than
with `joint: off`, so KL is the same. Times are of one thread in one run, ratios to the codec's own.
`keep` is remembering a chunk, and forgetting it in the end.

Equal bodies, which `joint: exact` keeps once, are counted beside it, and the bytes on disk, in
blocks of 4 KiB, of whole chunks and of a form that is not built: every body in a file of its own,
every chunk's head in another.

shared: two essays behind other system prompts, in either order. edited: ten versions of a source
file of the standard library, each with one more edit. agent: a loop that sends tool output again
while older turns are dropped. chats: problems and essays that have nothing in common but a system
prompt. Documents are those whose number modulo 4 is 3.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import os
import platform
import random
import textwrap
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.cpu.delta import DeltaCoder
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.tiers.delta_store import DeltaStore
from kvtc_vllm.tiers.disk import disk_bytes
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 128
PASSAGE = 448
"""Tokens of a document."""
VERSIONS = 10
CHATS = 6
TENANT = b"one tenant"
SPANS = ("encode", "search", "difference", "keep", "decode", "whole")
SYSTEMS = (
    "You are a helpful assistant. Answer from the documents below and say which one you used.\n\n",
    "Today is Monday. You work for a publisher. Be brief, be kind, quote literally, and if the "
    "text does not say it, answer that you do not know.\n\n",
    "Summarise for a reader who has one minute. Use three bullets at most.\n\n",
)


class Trace:
    """Prompts as token ids, in the order in which they come."""

    def __init__(self, data: Path, tokenizer: Any) -> None:
        self._encode = tokenizer.encode
        with gzip.open(data / "essays.jsonl.gz", "rt") as file:
            texts = [json.loads(line)["text"] for line in file][3::4]
        essays = [tokenizer.encode(text) for text in texts]
        self._essays = [ids for ids in essays if len(ids) > 2 * PASSAGE]
        lines = (data / "gsm8k-test.jsonl").read_text().splitlines()[3::4]
        self._problems = [json.loads(line) for line in lines]

    def prompts(self, name: str) -> Iterator[list[int]]:
        """Of one trace."""
        made: dict[str, Iterator[list[int]]] = {
            "shared": self._shared(),
            "edited": self._edited(),
            "agent": self._agent(),
            "chats": self._chats(),
        }
        return made[name]

    def _shared(self) -> Iterator[list[int]]:
        one, two = (ids[:PASSAGE] for ids in self._essays[:2])
        for system in SYSTEMS:
            for first, second in ((one, two), (two, one)):
                yield [*self._encode(system), *first, *self._encode("\n\n"), *second]

    def _edited(self) -> Iterator[list[int]]:
        rng = random.Random(0)
        lines = inspect.getsource(textwrap).splitlines()[:110]
        for version in range(VERSIONS):
            if version:
                place = rng.randrange(len(lines))
                if version % 2:
                    lines.insert(place, f"        # TODO: look at case {version} again")
                else:
                    lines[place] = lines[place].replace("self", "this").replace("text", "string")
            yield self._encode(SYSTEMS[0] + "\n".join(lines))

    def _agent(self) -> Iterator[list[int]]:
        outputs = [
            f"\n\nTool output {n}:\n" + problem["question"] + "\n" + problem["answer"] * 2
            for n, problem in enumerate(self._problems[:14])
        ]
        for step in range(8):
            # The last seven outputs, after a summary of what was dropped.
            summary = f"So far {step} of the tool's answers were read and noted. "
            yield self._encode(SYSTEMS[1] + summary + "".join(outputs[step : step + 7]))

    def _chats(self) -> Iterator[list[int]]:
        for n in range(CHATS):
            problems = self._problems[20 + 5 * n : 25 + 5 * n]
            asked = "\n\n".join(p["question"] + "\n" + p["answer"] for p in problems)
            yield self._encode(SYSTEMS[0] + asked)
            yield [*self._encode(SYSTEMS[0]), *self._essays[n][PASSAGE : 2 * PASSAGE]]


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.joint_delta", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--data", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--artifact", type=Path, required=True, help="of codec kvtc2")
    parser.add_argument("--traces", default="shared,edited,agent,chats")
    parser.add_argument("--ratios", default="16,32", help="target ratios")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/joint_delta.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    trace = Trace(args.data, AutoTokenizer.from_pretrained(args.model))
    artifact = load_rank_artifact(args.artifact, 0)[0]
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    # Trace by trace, so that a small machine can be given one at a time.
    rows: dict[str, list[dict[str, Any]]] = {}
    if args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    for name in args.traces.split(","):
        rows[name] = measure(model, list(trace.prompts(name)), artifact, ratios)
        for row in rows[name]:
            print(name, row, flush=True)
        result = {
            "command": "python -m benchmarks.joint_delta --model DIR --data DIR --artifact DIR",
            "model": args.model.name,
            "artifact": artifact.fingerprint.hex(),
            "chunk_tokens": CHUNK,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    model: Any, prompts: Sequence[list[int]], artifact: RankArtifact, ratios: Sequence[float]
) -> list[dict[str, Any]]:
    """A row per ratio."""
    tiers = [Tier(artifact, ratio) for ratio in ratios]
    for ids in prompts:
        k, v = compute(model, ids)
        for tier in tiers:
            tier.store(ids, k, v)
    return [tier.row(len(prompts)) for tier in tiers]


class Tier:
    """A memory tier of one plan, and what it took."""

    def __init__(self, artifact: RankArtifact, ratio: float) -> None:
        self._ratio = ratio
        self._codec: ChunkCodec = open_codec(
            artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio
        )
        self._arena = MemoryArena(1 << 40)
        self._store = DeltaStore(self._arena, DeltaCoder(artifact, replace(ENTROPY, level=1)))
        self._blobs: dict[RecordKey, bytes] = {}
        self._differences: set[RecordKey] = set()
        self._seconds = dict.fromkeys(SPANS, 0.0)

    def store(self, ids: Sequence[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Whole chunks of a prompt. k, v: [T, L, H, D]."""
        for start in range(0, len(ids) - CHUNK + 1, CHUNK):
            end = start + CHUNK
            key = RecordKey(xxhash.xxh3_128_digest(array("i", ids[:end]).tobytes()))
            if key in self._blobs:
                continue
            self._blobs[key] = self._timed(
                "encode", lambda s=start, e=end, n=key: self._codec.encode(k[s:e], v[s:e], s, n)
            )
            tokens = array("i", ids[start:end]).tobytes()
            self._timed("search", lambda t=tokens, n=key: self._store._windows.find(n, TENANT, t))
            new = self._timed(
                "difference",
                lambda n=key, t=tokens: self._store.prepare(n, self._blobs[n], TENANT, t),
            )
            self._timed("keep", lambda n=key, b=new: self._store.write(n, b, TENANT))
            if new.difference is None:
                continue
            self._differences.add(key)

    def row(self, prompts: int) -> dict[str, Any]:
        """Bytes and times; raises AssertionError if a record is not read as it was written."""
        for key, blob in self._blobs.items():
            name = "whole" if key in self._differences else "nothing"
            self._seconds.setdefault(name, 0.0)
            assert self._timed(name, lambda n=key: self._store.read(n)) == blob
        for key in self._differences:
            self._timed("decode", lambda n=key: self._codec.decode(self._blobs[n], key=n))
        chunks, found = len(self._blobs), len(self._differences)
        used, share = self._arena.used, self._share() if found else None
        self._timed("keep", lambda: self._store.remove(self._blobs))
        off = sum(map(len, self._blobs.values()))
        seconds = self._seconds
        return {
            "target_ratio": self._ratio,
            "prompts": prompts,
            "chunks": chunks,
            "differences": found,
            "off_bytes": off,
            "delta_bytes": used,
            "saved": round(1 - used / off, 4),
            **self._exact(),
            "share_of_a_difference": share,
            "search_microseconds_per_chunk": round(1e6 * seconds["search"] / chunks),
            "keep_microseconds_per_chunk": round(1e6 * seconds["keep"] / chunks),
            "store_time_to_encoding": round(
                1 + (seconds["difference"] + seconds["keep"]) / seconds["encode"], 4
            ),
            "load_time_to_decoding": round(1 + seconds["whole"] / seconds["decode"], 3)
            if found
            else None,
        }

    def _exact(self) -> dict[str, int]:
        """Of bodies kept once."""
        own = HEADER_BYTES + CHECKSUM_BYTES
        bodies = {blob[HEADER_BYTES:-CHECKSUM_BYTES] for blob in self._blobs.values()}
        apart = sum(disk_bytes(len(body)) for body in bodies)
        return {
            "equal_bodies": len(self._blobs) - len(bodies),
            "disk_bytes": sum(disk_bytes(len(blob)) for blob in self._blobs.values()),
            "disk_bytes_of_bodies_kept_once": apart + len(self._blobs) * disk_bytes(own),
        }

    def _share(self) -> float:
        """Bytes of differences over those of their blobs."""
        kept = sum(len(self._arena.read(key)) for key in self._differences)
        return round(kept / sum(len(self._blobs[key]) for key in self._differences), 4)

    def _timed(self, name: str, call: Any) -> Any:
        started = time.thread_time()
        result = call()
        self._seconds[name] += time.thread_time() - started
        return result


@torch.no_grad()
def compute(model: Any, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K post-RoPE and V of a prompt, bfloat16 [T, L, H, D]."""
    cache: Any = DynamicCache()
    model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    k, v = (
        torch.stack([getattr(layer, which)[0].transpose(0, 1) for layer in cache.layers], dim=1)
        for which in ("keys", "values")
    )
    return k.to(torch.bfloat16), v.to(torch.bfloat16)


if __name__ == "__main__":
    main()
