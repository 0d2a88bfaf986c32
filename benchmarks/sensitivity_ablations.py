"""What sensitivity weights owe to their metric, their data and how they were found.

    python -m benchmarks.sensitivity_ablations NAME --model DIR --spool DIR --data DIR --work DIR
                                               [--out benchmarks/results/sensitivity-NAME.json]

NAME is one of

    metric      no weights, a weight per layer, per layer and head, a matrix per layer and head
    method      gradients against noise in vLLM; --probe FILE is what the probe found
    documents   3, 6, 12 and 20 documents
    retrieval   retrieval prompts among the documents or not
    domains     weights of essays, of maths and of code, each used on all three
    tokens      weights of all and of ordinary tokens, sinks coded or kept in 16 bits

Artifacts of version 1 are fitted to the same rows of one spool, with other weights and nothing
else changed. Documents of the report part (or --part) go through the codec as in
`benchmarks.sensitivity`: 768 tokens of prefix in blobs, at least 128 exact after them, KL over the
tokens that follow. Bytes are of whole blobs. Intervals are 95 %, bootstrapped over documents.
*factor* is KL over that of the ablation's first variant, or of --base, with its interval. --work
keeps gradients and fits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import CHUNK, ROOT
from benchmarks.sensitivity_gradients import KINDS_OF_TEXT, collect, marked_share
from benchmarks.sensitivity_texts import PREFIX, WINDOW, texts
from benchmarks.sensitivity_variants import (
    ABLATIONS,
    Material,
    Stored,
    fitted,
    keep_sinks,
    open_codec_of,
)
from kvtc_vllm.calibration.cache_replay import RESAMPLES, compute_prefix, interval, kl, score
from kvtc_vllm.calibration.sinks import fit_sinks
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.evaluation.data.public import Source


def main() -> None:
    """Fit what is not there, measure, print a table, write JSON after every document."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.sensitivity_ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=tuple(ABLATIONS))
    add("--model", type=Path, required=True, help="directory of the model")
    add("--spool", type=Path, required=True, help="what kvtc calibrate --spool left")
    add("--data", type=Path, required=True, help="directory of the public documents")
    add("--work", type=Path, required=True, help="directory for gradients and fits, which are kept")
    add("--probe", type=Path, help="sensitivity.json by --sensitivity probe, for method")
    add("--ratios", default="32,64", help="target ratios")
    add("--rows", type=int, default=12_000, help="rows to fit")
    add("--documents", type=int, default=4, help="of every kind of text to report on")
    add("--prompts", type=int, default=8, help="of retrieval to report on")
    add("--kinds", help="of text to report on; default: those of the ablation")
    add("--variants", help="these alone, such as layer,head; OUT keeps the rows of others")
    add("--part", choices=("tune", "report"), default="report", help="documents to measure on")
    add("--base", help="variant that factors are against; default: the ablation's first")
    add("--fit", action="store_true", help="fit what is not there, and measure nothing")
    add("--threads", type=int, default=1, help="of torch")
    add("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.out or ROOT / f"benchmarks/results/sensitivity-{args.name}.json"
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    material = read_material(args)
    ablation = ABLATIONS[args.name]
    variants = ablation.variants(material)
    base = args.base or variants[0].name
    known = [v.name for v in variants]
    chosen = args.variants.split(",") if args.variants else known
    for name in (*chosen, base):
        if name not in known:
            raise SystemExit(f"{args.name}: no variant is called {name!r}; it has {known}")
    variants = [v for v in variants if v.name in chosen]
    kinds = args.kinds.split(",") if args.kinds else ablation.kinds
    codecs = {
        (variant.name, ratio): open_codec_of(
            variant, fitted(variant, material, ratios, args.work), ratio, material
        )
        for variant in variants
        for ratio in ratios
    }
    if args.fit:
        return
    about: dict[str, Any] = {
        "command": command(args),
        "model": args.model.name,
        "variants": {variant.name: variant.about for variant in variants},
        "sinks": {kind: marked_share(material.gradients, kind) for kind in KINDS_OF_TEXT},
        "rows_fitted": args.rows,
        "prefix_tokens": PREFIX,
        "exact_tokens": WINDOW,
        "chunk_tokens": CHUNK,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    others = kept_rows(out, about, [variant.name for variant in variants])
    table: list[dict[str, Any]] = []
    names: list[str] = []
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    by_name = {variant.name: variant for variant in variants}
    measured: dict[tuple[str, str, float], list[Stored]] = {}
    source = Source(str(args.data), args.part)
    for text in texts(tokenizer, source, kinds, args.documents, args.prompts):
        started = time.monotonic()
        names.append(text.name)
        # What the last token predicts has no token to compare.
        whole = compute_prefix(model, text.name, text.ids[:-1], text.prefix, text.scored)
        for (variant, ratio), codec in codecs.items():
            stored = codec.round_trip(whole.k, whole.v)
            if by_name[variant].exact_sinks:
                stored = keep_sinks(stored, whole.k, whole.v, material.rule)
            predicted = score(model, whole.ids, stored.k, stored.v, text.scored)
            stored.kl = kl(whole.exact, predicted)
            same = predicted.argmax(-1) == whole.exact.argmax(-1)
            stored.agreed = float(same.double().mean())
            measured.setdefault((text.kind, variant, ratio), []).append(stored.without_tensors())
        print(f"{text.name}: {time.monotonic() - started:.0f} s", flush=True)
        table = others + [row(*key, found) for key, found in measured.items()]
        compare(table, base)
        write_results(out, about, names, table)
    for line in table:
        print(
            f"{line['kind']:14} {line['variant']:16} {line['target_ratio']:g}x: "
            f"real {line['real_ratio']:.1f}, KL {line['kl']:.5f} {line['interval']}"
            f" top-1 {line['agreed']:.3f}, of {base} {line.get('factor', 'not measured')}"
        )


def command(args: argparse.Namespace) -> str:
    """For the results: with all that decides figures, and no paths."""
    parts = [args.name, "--model DIR --spool DIR --data DIR --work DIR"]
    if args.probe is not None:
        parts.append("--probe FILE")
    sizes = ("ratios", "rows", "documents", "prompts")
    parts += [f"--{name} {getattr(args, name)}" for name in sizes]
    if args.kinds:
        parts.append(f"--kinds {args.kinds}")
    if args.part != "report":
        parts.append(f"--part {args.part}")
    if args.base:
        parts.append(f"--base {args.base}")
    return "python -m benchmarks.sensitivity_ablations " + " ".join(parts)


def write_results(
    out: Path, about: dict[str, Any], names: Sequence[str], table: Sequence[dict[str, Any]]
) -> None:
    """about: how it was measured. names: of the documents so far. table: a row per figure."""
    found = {"documents": list(names), "rows": list(table)}
    assert not found.keys() & about.keys()
    out.write_text(json.dumps(about | found, indent=1) + "\n")


def kept_rows(out: Path, about: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of other variants in OUT, whose descriptions go into `about`.

    Raises SystemExit if they were measured in another way.
    """
    if not out.exists():
        return []
    before = json.loads(out.read_text())
    differing = [k for k, v in about.items() if k != "variants" and before.get(k) != v]
    if differing:
        raise SystemExit(f"{out}: was measured with another {differing[0]}; give another --out")
    rows = [row for row in before["rows"] if row["variant"] not in names]
    left = {row["variant"] for row in rows}
    about["variants"] = {k: v for k, v in before["variants"].items() if k in left} | about[
        "variants"
    ]
    return rows


def read_material(args: argparse.Namespace) -> Material:
    """Rows, sinks and gradients."""
    reader = SpoolReader(args.spool / "rank0")
    sinks = fit_sinks(reader)
    ropes = [None if i is None else reader.ropes[i] for i in reader.layer_rope]
    rule = None if sinks is None else sinks.rule
    kept = args.work / "gradients.pt"
    gradients = collect(args.model, args.data, reader.geometry, ropes, rule, kept)
    return Material(reader, gradients, rule, args.rows, args.probe)


def row(kind: str, variant: str, ratio: float, found: Sequence[Stored]) -> dict[str, Any]:
    """Of one variant at one ratio, over documents of one kind."""
    divergence = [stored.kl for stored in found]
    low, high = interval(divergence)
    total = sum(stored.bytes for stored in found)
    return {
        "kind": kind,
        "variant": variant,
        "target_ratio": ratio,
        "real_ratio": round(sum(stored.raw for stored in found) / total, 2),
        "bytes": total,
        "kl": round(sum(divergence) / len(found), 6),
        "interval": [round(low, 6), round(high, 6)],
        "agreed": round(sum(stored.agreed for stored in found) / len(found), 4),
        "by_document": [round(value, 6) for value in divergence],
    }


def compare(table: Sequence[dict[str, Any]], base: str) -> None:
    """Put into every row by what factor its KL is that of variant `base`, and 95 % of the factor.

    Documents are resampled in pairs: both variants read the same ones.
    """
    bases = {
        (line["kind"], line["target_ratio"]): line["by_document"]
        for line in table
        if line["variant"] == base
    }
    generator = torch.Generator().manual_seed(0)
    for line in table:
        own = torch.tensor(line["by_document"], dtype=torch.float64)
        other = torch.tensor(
            bases.get((line["kind"], line["target_ratio"]), []), dtype=torch.float64
        )
        if len(own) != len(other):
            continue
        drawn = torch.randint(len(own), (RESAMPLES, len(own)), generator=generator)
        factors = (own[drawn].mean(dim=1) / other[drawn].mean(dim=1)).sort().values
        low, high = (float(factors[int(share * RESAMPLES)]) for share in (0.025, 0.975))
        mean = float(own.mean() / other.mean())
        line["factor"] = [round(value, 3) for value in (mean, low, high)]


if __name__ == "__main__":
    main()
