"""Damaged containers of every codec, many of them: found, or refused, or decoded within bounds.

    python -m benchmarks.reliability.mutations --count 100000 --seed 1

Half are damaged and left so: every one must be refused. Half are resealed with a valid
checksum: the bounds checks behind it must refuse them or decode them, without another exception,
in less than 2 s of processor time each and, on a sample, within 1 MiB beyond the blob. Prints a
dictionary.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

import torch

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES, checksum
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from tests.attacks.test_blobs import MODEL, RULE, TOKENS, allocation_peak, mutate, outcome
from tests.codec.v2.made_up import step_artifact

LONGEST_SECONDS = 2.0
SAMPLE_EVERY = 997
ALLOWANCE = 1 << 20


def run(count: int, seed: int) -> dict[str, object]:
    """Mutate and decode; `failures` counts broken promises."""
    torch.set_num_threads(1)
    codecs: list[ChunkCodec] = [
        RawCodec(MODEL.geometry, torch.bfloat16),
        KvtcCodec(MODEL.artifact((4.0, 8.0)), 4.0, torch.bfloat16),
        *(
            Kvtc2Codec(step_artifact(MODEL, (4.0, 8.0), RULE, paired=paired), 4.0, torch.bfloat16)
            for paired in (False, True)
        ),
    ]
    blobs = [codec.encode(*MODEL.chunk(TOKENS), 0) for codec in codecs]
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    largest = 0
    began = time.monotonic()
    for number in range(count):
        which = number % len(codecs)
        codec, blob = codecs[which], blobs[which]
        sealed = number // len(codecs) % 2 == 0
        damaged = bytes(mutate(blob, chance)) if sealed else _resealed(blob, chance)
        started = time.process_time()  # of other programs' time on the machine nothing follows
        try:
            found = outcome(codec, damaged)
        except Exception as error:
            failures.append(f"{number}: {error!r}")
            continue
        slowest = max(slowest, time.process_time() - started)
        outcomes[found] += 1
        if sealed and found == "decoded" and damaged != blob:
            failures.append(f"{number}: silently wrong")
        if number % SAMPLE_EVERY == 0:
            largest = max(largest, allocation_peak(codec, damaged))
    if slowest > LONGEST_SECONDS:
        failures.append(f"one decode took {slowest:.1f} s")
    if largest > ALLOWANCE:
        failures.append(f"one decode allocated {largest} bytes")
    return {
        "mutations": count,
        "failures": len(failures),
        "examples": failures[:5],
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest, 4),
        "largest_allocation_bytes": largest,
        "seconds": round(time.monotonic() - began, 1),
    }


def _resealed(blob: bytes, chance: random.Random) -> bytes:
    """Most edits go to the header and the tables, where the lengths are."""
    content, tables = blob[:-CHECKSUM_BYTES], HEADER_BYTES + 120
    if chance.random() < 0.75:
        content = bytes(mutate(content[:tables], chance)) + content[tables:]
    else:
        content = bytes(mutate(content, chance))
    return content + checksum(content)


def main() -> int:
    """Print what was found; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.count, args.seed)
    print(result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
