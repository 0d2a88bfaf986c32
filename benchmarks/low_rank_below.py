"""Low-rank and pruned KV below KVTC, with KVTC's basis fitted to what the method leaves.

    python -m benchmarks.low_rank_below --model DIR --data DIR --artifact DIR --work DIR
                                        [--methods recalkv,think-40,...] [--documents 3]
                                        [--out benchmarks/results/low-rank-below.json]

A model that serves with such a method has other K and V, and its artifact is calibrated on those.
Here transformers computes prefixes of 768 tokens; a method of `kvtc eval` takes each as a whole
through its form and back, and what it leaves goes through KVTC in blobs of 128 tokens, and back.
KL is that of `benchmarks.sensitivity`. Of every method there are

    alone      the method's own bytes
    plain      KVTC with the basis of rows that no method changed
    own        KVTC with the basis of rows that the method has changed

Bytes of *plain* and *own* are those of the blobs alone: no mask or index is added. Both bases are
fitted to the same tokens of `CALIBRATION` documents of each kind of text, of the calibration part,
ten layers together, K and V at the same ratio, without weights. --artifact gives geometry and RoPE
tables and is not used otherwise. --work keeps fits and statistics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, ROOT, Total, row
from benchmarks.sensitivity_gradients import KINDS_OF_TEXT, TEXTS
from benchmarks.sensitivity_texts import PREFIX, SCORED, WINDOW, texts
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.rank_file import read_rank_file, write_rank_file
from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.cache_replay import compute_prefix, kl, round_trip, score
from kvtc_vllm.calibration.fit import fit_rank
from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.calibration.shards import layer_groups
from kvtc_vllm.codec.artifact import Kind, RankArtifact
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.evaluation.baselines import BASELINES, Baseline
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.data.public import Source
from kvtc_vllm.evaluation.processes.profiles import model_statistics
from kvtc_vllm.evaluation.replay.baseline_codec import BaselineCodec
from kvtc_vllm.evaluation.settings import parse

METHODS = "recalkv,recalkv/share=0.75,lorc/scale=1.6,think-40,xkv"
CALIBRATION, HELD_OUT = 8, 3
"""Documents of each kind of text; and of all of these, for held-out errors."""
LAYERS_PER_GROUP = 10
"""A fit of all layers together takes ten times as long."""
KVTC = "kvtc"
Cache = tuple[torch.Tensor, torch.Tensor]
"""K post-RoPE and V, bfloat16 [T, L, H, D]."""


@dataclass(frozen=True)
class Form:
    """What a method leaves of a prefix; None: the prefix itself."""

    baseline: Baseline | None

    def through(self, cache: Cache) -> tuple[int, Cache]:
        """Bytes that the method stores, and what it gives back."""
        if self.baseline is None:
            return sum(x.nbytes for x in cache), cache
        stored, k, v = round_trip(BaselineCodec(self.baseline), *cache, len(cache[0]))
        return stored, (k, v)


class PrefixRows(CapturedRows):
    """Rows of whole prefixes without their first tokens; the last `HELD_OUT` are held out."""

    def __init__(self, caches: Sequence[Cache], like: RankArtifact) -> None:
        first = like.sink_tokens
        self._cache = {
            kind: torch.cat([cache[number][first:] for cache in caches])
            for number, kind in enumerate(("k", "v"))
        }
        lengths = [len(k) - first for k, _ in caches]
        docs = torch.repeat_interleave(torch.arange(len(caches)), torch.tensor(lengths))
        positions = torch.cat([torch.arange(first, first + length) for length in lengths])
        layers = like.geometry.num_layers
        super().__init__(
            replace(like.geometry, layer_groups=layer_groups(layers, LAYERS_PER_GROUP)),
            like.ropes,
            like.layer_rope,
            positions,
            docs,
            docs >= len(caches) - HELD_OUT,
        )

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return self._cache[kind][index][:, first:end]


def open_form(method: str, like: RankArtifact, statistics: Path) -> Form:
    """Of a method of `kvtc eval`. Raises ValueError for its settings, KeyError for its name."""
    if method == KVTC:
        return Form(None)
    name, given = parse(method)
    made = BASELINES[name]
    ropes = [None if index is None else like.ropes[index] for index in like.layer_rope]
    options: dict[str, Any] = dict(given)
    if issubclass(made, FittedBaseline):
        options["statistics"] = str(statistics)
    return Form(made(like.geometry, torch.bfloat16, ropes, **options))


def fitted(
    method: str, form: Form, caches: Sequence[Cache], like: RankArtifact, args: argparse.Namespace
) -> RankArtifact:
    """Fitted to what the form leaves of the caches; kept in --work."""
    path = args.work / f"below-{method.replace('/', '-')}-{args.ratios}.safetensors"
    if not path.exists():
        rows = PrefixRows([form.through(cache)[1] for cache in caches], like)
        ratios = [float(ratio) for ratio in args.ratios.split(",")]
        fit = fit_rank(rows, rows.geometry, rows.ropes, rows.layer_rope, ratios)
        print(f"{method}: fitted in {fit.seconds:.0f} s", flush=True)
        with replacing(path) as unfinished:
            write_rank_file(unfinished, fit.artifact, rows.probe(), 0, 1)
    return read_rank_file(path, 0, 1)[0]


def main() -> None:
    """Fit what is not there, measure, print a table, write JSON after every document."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.low_rank_below",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--data", type=Path, required=True, help="directory of the public documents")
    add("--artifact", type=Path, required=True, help="of version 1, for its geometry")
    add("--work", type=Path, required=True, help="directory for fits, which are kept")
    add("--methods", default=METHODS, help="codecs of `kvtc eval`, with settings")
    add("--ratios", default="16,32", help="target ratios of KVTC")
    add("--documents", type=int, default=3, help="of each kind of text")
    add("--fit", action="store_true", help="fit what is not there, and measure nothing")
    add("--out", type=Path, default=ROOT / "benchmarks/results/low-rank-below.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    statistics = args.work / "statistics.safetensors"
    if not statistics.exists():
        model_statistics(str(args.model), statistics)
    like = load_rank_artifact(args.artifact, 0)[0]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    methods = [KVTC, *args.methods.split(",")]
    forms = {method: open_form(method, like, statistics) for method in methods}
    calibration = Source(str(args.data), "calibrate")
    caches = [
        (prefix.k, prefix.v)
        for text in texts(tokenizer, calibration, TEXTS, CALIBRATION, 0)
        for prefix in [compute_prefix(model, text.name, text.ids, text.prefix, text.scored)]
    ]
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    codecs: dict[tuple[str, float], ChunkCodec] = {}
    for method, form in forms.items():
        artifact = fitted(method, form, caches, like, args)
        for ratio in ratios:
            codecs[method, ratio] = open_codec(
                "kvtc", torch.bfloat16, artifact=artifact, ratio=ratio
            )
    if args.fit:
        return
    result: dict[str, Any] = {
        "command": "python -m benchmarks.low_rank_below --model DIR --data DIR --artifact DIR "
        f"--work DIR --methods {args.methods} --ratios {args.ratios} --documents {args.documents}",
        "model": args.model.name,
        "prefix_tokens": PREFIX,
        "exact_tokens": WINDOW,
        "scored_tokens": SCORED,
        "layers_per_group": LAYERS_PER_GROUP,
        "rows_fitted": sum(len(k) - like.sink_tokens for k, _ in caches[:-HELD_OUT]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
    }
    totals: dict[tuple[str, str, float], Total] = {}
    names: list[str] = []
    report = Source(str(args.data), "report")
    for text in texts(tokenizer, report, KINDS_OF_TEXT, args.documents, args.documents):
        started = time.monotonic()
        names.append(text.name)
        prefix = compute_prefix(model, text.name, text.ids[:-1], text.prefix, text.scored)
        for way, ratio, stored, cache in all_ways(forms, codecs, ratios, (prefix.k, prefix.v)):
            total = totals.setdefault((text.kind, way, ratio), Total())
            total.raw += prefix.k.nbytes + prefix.v.nbytes
            total.stored += stored
            found = score(model, prefix.ids, *cache, text.scored)
            total.divergence.append(kl(prefix.exact, found))
        print(f"{text.name}: {time.monotonic() - started:.0f} s", flush=True)
        rows = [row(*key, total) for key, total in totals.items()]
        args.out.write_text(json.dumps(result | {"documents": names, "rows": rows}, indent=1))
    for line in rows:
        print(
            f"{line['kind']:14} {line['artifact']:34} {line['target_ratio']:g}x: "
            f"real {line['real_ratio']:.1f}, KL {line['kl']:.5f} {line['interval']}"
        )


def all_ways(
    forms: dict[str, Form],
    codecs: dict[tuple[str, float], ChunkCodec],
    ratios: Sequence[float],
    cache: Cache,
) -> list[tuple[str, float, int, Cache]]:
    """Name, target ratio (0: the method alone), bytes stored and what comes back."""
    found: list[tuple[str, float, int, Cache]] = []
    for method, form in forms.items():
        stored, left = form.through(cache)
        if method != KVTC:
            found.append((method, 0.0, stored, left))
        for ratio in ratios:
            bases = {method: "own"} if method == KVTC else {KVTC: "plain", method: "own"}
            for fit, basis in bases.items():
                taken, k, v = round_trip(codecs[fit, ratio], *left, CHUNK)
                name = method if method == KVTC else f"{method}+{KVTC}, {basis} basis"
                found.append((name, ratio, taken, (k, v)))
    return found


if __name__ == "__main__":
    main()
