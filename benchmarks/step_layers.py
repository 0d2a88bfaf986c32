"""Quality by steps: what a blob costs that can be made smaller later, against its alternatives.

    python -m benchmarks.step_layers --model DIR --data DIR --artifact DIR --spool DIR
                                     [--documents 3] [--part tune]
                                     [--out benchmarks/results/step_layers.json]

The artifact is of codec 2, with plans for --ratios, of which the first is the top level. Every way
goes from the top level to the lower ones:

    native       a blob of its own per level, from the rows: what no way can beat
    nested       the lower levels' bins are cut into the higher levels' (`benchmarks.step_nested`)
    columns      the top level's columns, in parts, dropped from the last; sinks keep all of theirs
    transcoded   decoded and encoded again at the lower level by the codec that serves on a CPU
    requantised  the levels of the blob, as coefficients, quantised by the lower level's plan
    halved       the levels halved, for plans that are fitted to that: `kvtc fit --halvings`; these
                 and the plan of the top level, here called *refitted*, are of the training rows

Bytes are of whole blobs of 128 tokens, in DEFLATE units. *over_native* compares with native bytes
of the same squared error of coefficients, between the native levels along the power law that they
have; KL, in nats per token, with native KL of the same bytes likewise. Documents and KL are those
of `benchmarks.sensitivity`, by default of the part for choosing. *seconds* are of CPU, per chunk,
one thread, from blob to blob; where none are given the way was not built for speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, ROOT, documents
from benchmarks.sensitivity_texts import PREFIX, SCORED
from benchmarks.step_forms import (
    Bench,
    Coefficients,
    Stored,
    cuts_for,
    fit_values,
    in_parts,
    nested,
    quantised,
)
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration.cache_replay import compute_prefix, round_trip
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.step_classes import Sample, StepSettings, make_step_plan
from kvtc_vllm.calibration.step_fit import sink_marks
from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.transform import to_coefficients
from kvtc_vllm.codec.v2.plan import StepPlan

TRAINING_ROWS = 2048


def squared_error(bench: Bench, found: Sequence[Stored]) -> float:
    """Of all coefficients of all documents."""
    return sum(
        float((d.x[key] - own.values[key]).double().square().sum())
        for d, own in zip(bench.documents, found, strict=True)
        for key in d.x
    )


@dataclass(frozen=True)
class Curve:
    """Native levels: pairs of (quality, bytes) by rising bytes; lines between their logarithms."""

    points: Sequence[tuple[float, float]]

    def bytes_at(self, quality: float) -> float:
        return _line([(q, b) for q, b in reversed(self.points)], quality)

    def quality_at(self, taken: float) -> float:
        return _line([(b, q) for q, b in self.points], taken)


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Through the nearest two points, by rising x."""
    pairs = list(pairwise(points))
    (x0, y0), (x1, y1) = next((p for p in pairs if x <= p[1][0]), pairs[-1])
    share = math.log(x / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** share


class Table:
    """Rows of the result, one after the other."""

    def __init__(self, bench: Bench, ratios: Sequence[float], around: Sequence[float]) -> None:
        self.bench = bench
        self.ratios = ratios
        self.native = {
            ratio: [quantised(d.x, bench.plans(ratio), d) for d in bench.documents]
            for ratio in sorted({*ratios, *around})
        }
        lowest = ratios[-1]
        codec = open_codec(
            "kvtc2", torch.bfloat16, artifact=bench.artifact, ratio=lowest, fast=False
        )
        whole = sum(round_trip(codec, d.prefix.k, d.prefix.v, CHUNK)[0] for d in bench.documents)
        self.overhead = whole - sum(own.taken for own in self.native[lowest])
        self.errors = Curve([(squared_error(bench, x), self._bytes(x)) for x in self._rising()])
        kls = {ratio: self._kl(found) for ratio, found in self.native.items()}
        self.kls = Curve([(sum(kls[r]), self._bytes(self.native[r])) for r in self._ratios()])

    def _ratios(self) -> list[float]:
        """Of native levels, by rising bytes."""
        return sorted(self.native, reverse=True)

    def _rising(self) -> list[list[Stored]]:
        return [self.native[ratio] for ratio in self._ratios()]

    def _bytes(self, found: Sequence[Stored]) -> int:
        return self.overhead + sum(own.taken for own in found)

    def _kl(self, found: Sequence[Stored]) -> list[float]:
        pairs = zip(self.bench.documents, found, strict=True)
        return [self.bench.kl(document, own.values) for document, own in pairs]

    def row(self, way: str, level: str, found: Sequence[Stored], **more: Any) -> dict[str, Any]:
        """Of one way at one level."""
        taken = self._bytes(found)
        return self.of(
            way,
            level,
            taken,
            self._kl(found),
            over_native=round(taken / self.errors.bytes_at(squared_error(self.bench, found)), 4),
            **more,
        )

    def of(self, way: str, level: str, taken: int, kls: list[float], **more: Any) -> dict[str, Any]:
        """Of bytes and the KL of each document."""
        mean = sum(kls) / len(kls)
        native = self.kls.quality_at(taken) / len(kls)
        return {
            "way": way,
            "level": level,
            "bytes": taken,
            "real_ratio": round(self.bench.raw / taken, 2),
            "kl": round(mean, 6),
            "kl_over_native": round(mean / native, 3),
            **more,
            "by_document": [round(value, 6) for value in kls],
        }


def measure(
    bench: Bench,
    ratios: Sequence[float],
    around: Sequence[float],
    training: Coefficients,
    marks: torch.Tensor,
) -> Iterator[dict[str, Any]]:
    """All rows."""
    table = Table(bench, ratios, around)
    top, *lower = ratios
    for ratio, found in table.native.items():
        yield table.row("native", f"{ratio:g}x", found)
    yield from halved(table, top, len(lower), training, marks)
    yield from requantised(table, ratios)
    yield from transcoded(table, ratios)
    rising = [bench.plans(ratio) for ratio in reversed(ratios)]
    names = [f"{ratio:g}x" for ratio in reversed(ratios)]
    forms: dict[str, list[dict[SectionKey, StepPlan]]] = {", ".join(names): rising}
    if len(lower) > 1:
        forms |= {f"{own:g}x, {top:g}x": [bench.plans(own), bench.plans(top)] for own in lower}
    for share in (2, 4):
        fewer = {key: shortened(plan, plan.rank // share) for key, plan in rising[0].items()}
        forms[f"1/{share} of the columns of {names[0]}, {names[-1]}"] = [fewer, rising[-1]]
    for name, levels in forms.items():
        fitted = fit_values(training, marks, levels)
        by_document = [nested(document, levels, fitted) for document in bench.documents]
        for number, layer in enumerate(zip(*by_document, strict=True)):
            yield table.row(f"nested: {name}", f"layer {number + 1}", layer)
    plans = bench.plans(top)
    targets = [sum(own.taken for own in table.native[ratio]) for ratio in reversed(lower)]
    cuts = cuts_for(bench, plans, training, targets)
    parts = [in_parts(document, plans, cuts) for document in bench.documents]
    for number, part in enumerate(zip(*parts, strict=True)):
        yield table.row("columns", f"part {number + 1}", part)


def halved(
    table: Table, top: float, times: int, training: Coefficients, marks: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """The top level, and plans nested in it."""
    bench = table.bench
    plans = bench.plans(top)
    plans = {
        key: make_step_plan(
            sample_of(x, plans[key].sink_gain, marks),
            marks,
            plans[key].step,
            StepSettings(sink_gain=plans[key].sink_gain),
        )
        for key, x in training.items()
    }
    for number in range(times + 1):
        if number:
            plans = nested_plans(training, marks, plans)
        found = [quantised(d.x, plans, d) for d in bench.documents]
        yield table.row("halved" if number else "refitted", f"{number} times", found)


def nested_plans(
    training: Coefficients, marks: torch.Tensor, fine: Mapping[SectionKey, StepPlan]
) -> dict[SectionKey, StepPlan]:
    """Of twice the step, nested in these."""
    return {
        key: make_step_plan(
            sample_of(x, fine[key].sink_gain, marks),
            marks,
            2 * fine[key].step,
            StepSettings(sink_gain=fine[key].sink_gain),
            fine[key],
        )
        for key, x in training.items()
    }


def sample_of(x: torch.Tensor, gain: float, marks: torch.Tensor) -> Sample:
    """Coefficients without the gain."""
    rows = x.T.clone()
    rows[marks] /= gain
    return Sample(rows, 0.0, len(x))


def requantised(table: Table, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """From the top level to each, and from each to the next."""
    bench = table.bench
    top = table.native[ratios[0]]
    held = top
    for number, ratio in enumerate(ratios[1:]):
        plans = bench.plans(ratio)
        ways = {f"{ratios[0]:g}x to {ratio:g}x": top}
        if number:
            ways[" to ".join(f"{own:g}x" for own in ratios[: number + 2])] = held
        for name, before in ways.items():
            found = [
                quantised(own.values, plans, document)
                for own, document in zip(before, bench.documents, strict=True)
            ]
            yield table.row("requantised", name, found)
        held = found


def transcoded(table: Table, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
    """From each level to the next."""
    bench = table.bench
    artifact = bench.artifact
    codecs = [
        open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio) for ratio in ratios
    ]
    held = [
        [codecs[0].encode(k, v, at) for at, k, v in _chunks(d.prefix.k, d.prefix.v)]
        for d in bench.documents
    ]
    for number in range(1, len(ratios)):
        before, after = codecs[number - 1 : number + 1]
        kls: list[float] = []
        lower: list[list[bytes]] = []
        started = time.process_time()
        for blobs in held:
            chunks = [before.decode(blob) for blob in blobs]
            lower.append([after.encode(c.k, c.v, c.start) for c in chunks])
        seconds = (time.process_time() - started) / sum(map(len, held))
        for document, blobs in zip(bench.documents, lower, strict=True):
            chunks = [after.decode(blob) for blob in blobs]
            k, v = torch.cat([c.k for c in chunks]), torch.cat([c.v for c in chunks])
            kls.append(bench.kl_of_cache(document, k, v))
        held = lower
        taken = sum(len(blob) for blobs in lower for blob in blobs)
        name = " to ".join(f"{own:g}x" for own in ratios[: number + 1])
        yield table.of("transcoded", name, taken, kls, seconds=round(seconds, 4))


def _chunks(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Positions, K and V."""
    for at in range(0, len(k), CHUNK):
        yield at, k[at : at + CHUNK], v[at : at + CHUNK]


def shortened(plan: StepPlan, rank: int) -> StepPlan:
    """With its first columns alone; marked tokens have nothing beyond."""
    return replace(plan, classes=plan.classes[:rank], beyond=None)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.step_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--data", type=Path, required=True, help="directory of the public documents")
    add("--artifact", type=Path, required=True, help="of codec kvtc2")
    add("--spool", type=Path, required=True, help="that it was fitted to")
    add("--ratios", default="16,32,64", help="levels, the top one first")
    add("--around", default="8", help="more native levels, for the curve")
    add("--documents", type=int, default=3, help="at most 10")
    add("--part", choices=("tune", "report"), default="tune")
    add("--out", type=Path, default=ROOT / "benchmarks/results/step_layers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    around = [float(ratio) for ratio in args.around.split(",") if ratio]
    artifact = load_rank_artifact(args.artifact, 0)[0]
    training, marks = training_coefficients(args.spool, artifact)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = islice(documents(args.data, tokenizer, args.part), args.documents)
    prefixes = [compute_prefix(model, *document, PREFIX, SCORED) for document in found]
    bench = Bench(artifact, model, prefixes)
    result = {
        "command": "python -m benchmarks.step_layers --model DIR --data DIR --artifact DIR "
        f"--spool DIR --ratios {args.ratios} --documents {args.documents} --part {args.part}",
        "model": args.model.name,
        "artifact": artifact.fingerprint.hex(),
        "documents": [prefix.name for prefix in prefixes],
        "unit": "bytes of all documents' blobs; KL in nats per token, mean over documents",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
    }
    rows: list[dict[str, Any]] = []
    for row in measure(bench, ratios, around, training, marks):
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items()), flush=True)
        args.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def training_coefficients(spool: Path, artifact: RankArtifact) -> tuple[Coefficients, torch.Tensor]:
    """Of neighbouring rows that the fit has seen, and which are marked."""
    source = RankRows([SpoolReader(spool / "rank0")], 1, 0, None)
    index = source.select(heldout=False)
    blocks = list(index.split(CHUNK))[:: max(1, len(index) // TRAINING_ROWS)]
    index = torch.cat(blocks)[:TRAINING_ROWS]
    marks = sink_marks(source, source.geometry, index, artifact.sink_rule)
    found = {}
    for key, section in artifact.sections.items():
        own = to_coefficients(source.take(*key, index), section, section.rank)
        own[marks] *= next(iter(section.plans.values())).sink_gain
        found[key] = own.T.contiguous()
    return found, marks


if __name__ == "__main__":
    main()
