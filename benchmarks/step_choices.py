"""What codec 2 owes to its choices, each against the same base: bytes, KL, products and room.

    python -m benchmarks.step_choices NAME --model DIR --spool DIR --data DIR --work DIR
                                      [--part report] [--out benchmarks/results/step-NAME.json]

NAME is one of

    sinks    none protected; the first four exact; floating ones marked; both; the first one exact
             and floating ones marked
    gain     floating sinks quantised 2, 4 and 8 times finer
    chunk    64, 128 and 256 tokens per blob
    columns  bits that a column must save per token for its time, 0 to 8; columns of sinks alone
    parts    columns of all layers, others of two, three or five runs of layers alone; with a price
             of columns besides

With --layers a layer group has so many layers, with --kv-basis shared K and V have one basis.
Bases are fitted once to the rows of a spool, with weights by its sensitivity.json, and kept in
--work, as are the documents' caches; variants differ in their plans. Documents and KL are those of
`benchmarks.sensitivity`, by default of the part for choosing. Ratios are of whole blobs; every
variant meets the target ratio on calibration rows with all that it stores. *products* are millions
of multiplications with an addition per token, of encoding and again of decoding, zeros of the basis
left out. *basis* is the room of all plans' columns in an artifact.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sensitivity import ROOT, documents
from benchmarks.sensitivity_texts import PREFIX, SCORED
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.calibration.cache_replay import (
    Prefix,
    compute_prefix,
    interval,
    kl,
    round_trip,
    score,
)
from kvtc_vllm.calibration.fit_settings import FitSettings, lowest_own_ratio
from kvtc_vllm.calibration.parts import TURNED
from kvtc_vllm.calibration.section_fit import SectionFitter
from kvtc_vllm.calibration.sensitivity import SENSITIVITY_NAME, load_sensitivity
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.sinks import fit_sinks
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.step_classes import Sample, StepSettings
from kvtc_vllm.calibration.step_fit import overhead_bytes, sample_index, sink_marks
from kvtc_vllm.calibration.step_plans import make_step_plans
from kvtc_vllm.calibration.weights import RowWeights, finer_steps
from kvtc_vllm.codec.artifact import (
    APART,
    PAIRED,
    RankArtifact,
    SectionBasis,
    SectionKey,
    SectionName,
)
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import ENTROPY


@dataclass(frozen=True)
class Choice:
    """sink_tokens: exact first positions. marked: floating sinks are. chunk: tokens per blob.
    parts, turned: of bases, see `FitSettings`. measured_gain: sinks have the gain that
    sensitivities say, not that of steps."""

    name: str
    steps: StepSettings = field(default_factory=StepSettings)
    sink_tokens: int = 4
    marked: bool = True
    chunk: int = 128
    parts: int = 1
    turned: float = TURNED
    measured_gain: bool = False


def _of_parts(parts: int, turned: float, bits: float = StepSettings.column_bits) -> Choice:
    name = "whole" if parts == 1 else f"{parts} parts, {turned:.3f} of all"
    return Choice(
        name if bits == StepSettings.column_bits else f"{name}, {bits:g} bits",
        StepSettings(column_bits=bits),
        parts=parts,
        turned=turned,
        measured_gain=True,
    )


CHOICES: dict[str, tuple[Choice, ...]] = {
    "sinks": (
        Choice("off", sink_tokens=0, marked=False),
        Choice("first four", marked=False),
        Choice("detected", sink_tokens=0),
        Choice("both"),
        Choice("first one, detected", sink_tokens=1),
    ),
    "gain": tuple(
        Choice(f"gain {gain:g}", StepSettings(sink_gain=gain)) for gain in (2.0, 4.0, 8.0)
    ),
    "chunk": tuple(Choice(f"{tokens} tokens", chunk=tokens) for tokens in (64, 128, 256)),
    "columns": (
        *(
            Choice(f"{bits:g} bits", StepSettings(column_bits=bits))
            for bits in (0.0, 1.0, 2.0, 4.0, 8.0)
        ),
        *(
            Choice(f"sinks {bits:g} bits", StepSettings(beyond_bits=bits))
            for bits in (1.0, 2.0, 4.0, 8.0)
        ),
    ),
    "parts": (
        *(_of_parts(1, TURNED, bits) for bits in (1.0, 2.0, 3.0, 4.0, 6.0)),
        *(_of_parts(2, turned) for turned in (1 / 24, 1 / 12, 1 / 6)),
        *(_of_parts(3, turned, bits) for turned in (1 / 24, 1 / 12, 1 / 6) for bits in (1.0, 3.0)),
        *(_of_parts(parts, TURNED) for parts in (5, 10)),
    ),
}


@dataclass(frozen=True)
class Fitted:
    """Bases and samples of all sections; marks of the samples, what told them, and the
    gain that sensitivities give them."""

    source: RankRows
    sections: dict[SectionKey, tuple[SectionBasis, Sample]]
    marks: torch.Tensor
    rule: SinkRule | None
    gain: float | None


def main() -> None:
    """Fit what is not there, measure, print a table, write JSON after every variant."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.step_choices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=tuple(CHOICES))
    add("--model", type=Path, required=True, help="directory of the model")
    add("--spool", type=Path, required=True, help="of kvtc calibrate --sensitivity gradient")
    add("--data", type=Path, required=True, help="directory of the public documents")
    add("--work", type=Path, required=True, help="directory for bases, which are kept")
    add("--kv-basis", choices=("each", "shared"), default="each")
    add("--layers", type=int, help="per layer group; default: all")
    add("--ratios", default="8,16,32,64", help="target ratios")
    add("--choices", help='these alone, such as "gain 4;gain 8"')
    add("--documents", type=int, default=10, help="at most 10")
    add("--part", choices=("tune", "report"), default="tune")
    add("--threads", type=int, default=1, help="of torch")
    add("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    out = args.out or ROOT / f"benchmarks/results/step-{args.name}.json"
    known = [choice.name for choice in CHOICES[args.name]]
    asked = args.choices.split(";") if args.choices else known
    if unknown := set(asked) - set(known):
        parser.error(f"--choices {'; '.join(sorted(unknown))}: {args.name} has {'; '.join(known)}")
    wanted = [choice for choice in CHOICES[args.name] if choice.name in asked]
    names = PAIRED if args.kv_basis == "shared" else APART
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kept = args.work / f"prefixes-{args.part}.pt"
    if not kept.exists():
        found = list(documents(args.data, tokenizer, args.part))
        torch.save([compute_prefix(model, *document, PREFIX, SCORED) for document in found], kept)
    # Our own file.
    prefixes = torch.load(kept, weights_only=False)[: args.documents]
    about = {
        "command": f"python -m benchmarks.step_choices {args.name} --model DIR --spool DIR "
        f"--data DIR --work DIR --part {args.part} --documents {args.documents} "
        f"--ratios {args.ratios}"
        + ("" if args.kv_basis == "each" else f" --kv-basis {args.kv_basis}")
        + ("" if args.layers is None else f" --layers {args.layers}")
        + ("" if args.choices is None else f' --choices "{args.choices}"'),
        "model": args.model.name,
        "documents": [prefix.name for prefix in prefixes],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "transformers")},
        "unit": "KL in nats per token, mean over documents; [low, high] is 95 %",
    }
    rows: list[dict[str, Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for choice in wanted:
        fitted = fit_bases(args.spool, args.layers, min(ratios), args.work, names, choice)
        artifact = artifact_of(choice, fitted, ratios)
        for ratio in ratios:
            rows.append(measure(choice, artifact, ratio, model, prefixes))
            print(*(f"{k} {v}" for k, v in rows[-1].items() if k != "by_document"), flush=True)
        out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def fit_bases(
    spool: Path,
    layers: int | None,
    lowest: float,
    work: Path,
    names: Sequence[SectionName],
    choice: Choice,
) -> Fitted:
    """Bases of all sections by the codec's own fit, and their coefficients of sample rows."""
    reader = SpoolReader(spool / "rank0")
    source = RankRows([reader], 1, 0, layers)
    geometry = source.geometry
    sinks = fit_sinks(source)
    rule = None if sinks is None else sinks.rule
    path = spool / SENSITIVITY_NAME
    found = load_sensitivity(path, geometry.num_layers, reader.header.total_kv_heads)
    weights = RowWeights(found, "ordinary" if rule is not None else "all")
    settings = FitSettings(
        codec="kvtc2",
        weights=weights,
        paired=names == PAIRED,
        parts=choice.parts,
        turned=choice.turned,
    )
    index = sample_index(source, settings, torch.Generator().manual_seed(settings.seed))
    marks = sink_marks(source, geometry, index, rule)
    of_parts = "" if choice.parts == 1 else f"-{choice.parts}-{choice.turned:.3f}"
    kept = work / f"bases-{'-'.join(names)}-{layers or 'all'}-{lowest:g}{of_parts}.pt"
    if not kept.exists():
        fitters = {
            key: SectionFitter(
                source,
                geometry,
                *key,
                lowest_own_ratio(geometry, *key, [lowest], settings),
                settings,
                None,
            )
            for key in geometry.section_keys(names)
        }
        work.mkdir(parents=True, exist_ok=True)
        sections = {key: (fitter.basis, fitter.sample(index)) for key, fitter in fitters.items()}
        torch.save(sections, kept)
    # Our own file.
    return Fitted(source, torch.load(kept, weights_only=False), marks, rule, finer_steps(found))


def artifact_of(choice: Choice, fitted: Fitted, ratios: Sequence[float]) -> RankArtifact:
    """With plans by a choice."""
    source = fitted.source
    rule = fitted.rule if choice.marked else None
    steps = choice.steps
    if choice.measured_gain and fitted.gain is not None:
        steps = replace(steps, sink_gain=fitted.gain)
    plans = make_step_plans(
        [sample for _, sample in fitted.sections.values()],
        fitted.marks & torch.tensor(choice.marked),
        ratios,
        overhead_bytes(source, source.geometry, choice.sink_tokens, rule, ENTROPY),
        ENTROPY,
        steps,
        lambda stage, done, total: None,
    )
    sections: dict[SectionKey, SectionBasis] = {}
    for (key, (basis, _)), own in zip(fitted.sections.items(), plans, strict=True):
        rank = max(1, *(plan.total_rank for plan in own.values()))
        sections[key] = replace(basis, basis=basis.basis[:, :rank].contiguous(), plans=own)
    return RankArtifact(
        geometry=source.geometry,
        sections=sections,
        ropes=source.ropes,
        layer_rope=source.layer_rope,
        fingerprint=artifact_fingerprint(source.geometry, sections, choice.sink_tokens, rule),
        sink_tokens=choice.sink_tokens,
        codec="kvtc2",
        sink_rule=rule,
    )


def measure(
    choice: Choice, artifact: RankArtifact, ratio: float, model: Any, prefixes: Sequence[Prefix]
) -> dict[str, Any]:
    """One row of the table."""
    codec = open_codec("kvtc2", torch.bfloat16, artifact=artifact, ratio=ratio)
    stored = raw = marked = 0
    divergence = []
    for prefix in prefixes:
        taken, k, v = round_trip(codec, prefix.k, prefix.v, choice.chunk)
        stored += taken
        raw += prefix.k.nbytes + prefix.v.nbytes
        divergence.append(kl(prefix.exact, score(model, prefix.ids, k, v, SCORED)))
        if artifact.sink_rule is not None:
            own = prefix.v[choice.sink_tokens :]
            marked += sum(int(artifact.sink_rule.marks(p).sum()) for p in own.split(choice.chunk))
    low, high = interval(divergence)
    parts = [(section.basis, section.plans[ratio]) for section in artifact.sections.values()]
    return {
        "choice": choice.name,
        "target_ratio": ratio,
        "real_ratio": round(raw / stored, 2),
        "kl": round(sum(divergence) / len(divergence), 6),
        "interval": [round(low, 6), round(high, 6)],
        "marked_percent": round(100 * marked / sum(len(p.k) for p in prefixes), 2),
        "columns": sum(plan.rank for _, plan in parts),
        "products": round(sum(int((b[:, : p.rank] != 0).sum()) for b, p in parts) / 1e6, 1),
        "basis_mb": round(sum(basis.nbytes for basis, _ in parts) / 1e6, 1),
        "by_document": [round(value, 6) for value in divergence],
    }


if __name__ == "__main__":
    main()
