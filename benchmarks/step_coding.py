"""Bytes of codec 2's codes under several entropy coders, on held-out rows of a spool.

    python -m benchmarks.step_coding --spool DIR --artifact DIR [--ratios 16,32]
                                     [--out benchmarks/results/step_coding.json]

Coders: DEFLATE as isal makes it by default, with matches; zlib's strategies for runs and for
Huffman codes alone; isal without matches, in one unit per stream and in units of some KiB, the
last of which is the codec's own; and static-table rANS, one table per class. Of the last only the
ideal length of its codes is counted, with 12-bit frequencies from training rows, and the states
and offset of one stream of 32 lanes per section: what no real coder of that kind can beat.

Ratios are of whole blobs without exact sinks: sections, their entries, header and marks. Speeds are
MB/s of payload per second of CPU time, encoding.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.step_fit import sink_marks
from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.container import container_bytes, section_bytes
from kvtc_vllm.codec.entropy import UNIT_BYTES, DeflateCoder, aligned, cut_units
from kvtc_vllm.codec.marks import marks_length
from kvtc_vllm.codec.transform import to_coefficients
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

ROOT = Path(__file__).resolve().parents[1]
ROWS = 1024
CHUNKS = (64, 128, 256)
LEVELS = 64
"""Of a table; larger ones are escapes."""
STREAM_BYTES = 132
FREQUENCIES = 4096

Coder = Callable[[Sequence[bytes]], int]
"""Streams -> bytes of unit table and body."""


@dataclass(frozen=True)
class Codes:
    """Of one section at one ratio: int32 [r, n] of training rows and of held-out ones."""

    plan: StepPlan
    training: torch.Tensor
    heldout: torch.Tensor


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_coding", description=__doc__)
    parser.add_argument("--spool", type=Path, required=True)
    parser.add_argument("--artifact", type=Path, required=True, help="of codec kvtc2")
    parser.add_argument("--ratios", default="16,32", help="target ratios")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/step_coding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    artifact = load_rank_artifact(args.artifact, 0)[0]
    source = RankRows([SpoolReader(args.spool / "rank0")], 1, 0, None)
    rows: list[dict[str, Any]] = []
    for ratio in map(float, args.ratios.split(",")):
        codes = all_codes(source, artifact, ratio)
        for chunk in CHUNKS:
            rows += measure(codes, artifact, ratio, chunk)
    for row in rows:
        print(*(f"{name} {value}" for name, value in row.items()))
    result = {
        "command": "python -m benchmarks.step_coding --spool DIR --artifact DIR",
        "artifact": artifact.fingerprint.hex(),
        "rows": rows,
        "machine": f"{platform.machine()}, 1 core used",
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def all_codes(source: RankRows, artifact: RankArtifact, ratio: float) -> list[Codes]:
    """Of every section, for neighbouring rows."""
    indexes = [source.select(heldout=heldout)[:ROWS] for heldout in (False, True)]
    marks = [sink_marks(source, source.geometry, i, artifact.sink_rule) for i in indexes]

    def quantised(key: SectionKey, which: int) -> torch.Tensor:
        section = artifact.sections[key]
        plan = step_plan(section, ratio)
        found = to_coefficients(source.take(*key, indexes[which]), section, plan.rank)
        found[marks[which]] *= plan.sink_gain
        return plan.quantise(found)

    return [
        Codes(step_plan(section, ratio), quantised(key, 0), quantised(key, 1))
        for key, section in artifact.sections.items()
    ]


def measure(
    codes: Sequence[Codes], artifact: RankArtifact, ratio: float, chunk: int
) -> list[dict[str, Any]]:
    """A row per coder. chunk: tokens per blob."""
    tokens = codes[0].heldout.shape[1]
    blobs = math.ceil(tokens / chunk)
    fixed = container_bytes([])
    if artifact.sink_rule is not None:
        fixed += section_bytes(aligned(marks_length(chunk)))
    fixed += section_bytes(0) * len(codes)
    raw = tokens * 2 * sum(section.basis.shape[0] for section in artifact.sections.values())
    payloads = [
        encode_codes(own.heldout[:, first : first + chunk], own.plan.packed)
        for own in codes
        for first in range(0, tokens, chunk)
    ]
    payload_bytes = sum(len(stream) for streams in payloads for stream in streams)

    def row(name: str, taken: float, seconds: float | None) -> dict[str, Any]:
        return {
            "ratio": ratio,
            "chunk_tokens": chunk,
            "coder": name,
            "real_ratio": round(raw / (taken + fixed * blobs), 2),
            "mb_s": None if seconds is None else round(payload_bytes / 1e6 / seconds),
        }

    found = []
    for name, coder in coders().items():
        started = time.process_time()
        taken = sum(map(coder, payloads))
        found.append(row(name, taken, time.process_time() - started))
    ideal = sum(static_bytes(own) for own in codes) + STREAM_BYTES * blobs * len(codes)
    return [*found, row("rANS, ideal length", ideal, None)]


def coders() -> dict[str, Coder]:
    """By what a reader may call them."""
    return {
        "isal, matches": of_units(DeflateCoder()),
        "zlib, runs": of_zlib(zlib.Z_RLE),
        "zlib, Huffman": of_zlib(zlib.Z_HUFFMAN_ONLY),
        "isal, no matches": of_units(DeflateCoder(matches=False)),
        **{
            f"isal, no matches, {size >> 10} KiB": of_units(
                DeflateCoder(matches=False, unit_bytes=size)
            )
            for size in (4096, 16384, 8192)
        },
    }


def of_units(coder: DeflateCoder) -> Coder:
    def taken(streams: Sequence[bytes]) -> int:
        encoded = coder.encode(streams)
        return UNIT_BYTES * len(encoded.units) + len(encoded.body)

    return taken


def of_zlib(strategy: int) -> Coder:
    def taken(streams: Sequence[bytes]) -> int:
        total = 0
        for stream in streams:
            at = 0
            for size in cut_units([len(stream)]):
                deflater = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
                unit = deflater.compress(stream[at : at + size]) + deflater.flush()
                total += UNIT_BYTES + aligned(min(len(unit), size))
                at += size
        return total

    return taken


def static_bytes(codes: Codes) -> float:
    """Ideal length of held-out codes under static tables of the training codes, one per class."""
    classes = codes.plan.classes.long()
    count = len(codes.plan.widths)
    most = 2 * LEVELS
    places = codes.training.clamp_max(most).long() + classes[:, None] * (most + 1)
    table = torch.bincount(places.flatten(), minlength=count * (most + 1)).view(count, -1).double()
    frequencies = (table / table.sum(1, keepdim=True) * FREQUENCIES).clamp_min(1)
    bits = -(frequencies / frequencies.sum(1, keepdim=True)).log2()
    found = codes.heldout.clamp_max(most).long()
    escapes = int((codes.heldout >= most).sum())
    return float(bits[classes].gather(1, found).sum()) / 8 + escapes


if __name__ == "__main__":
    main()
