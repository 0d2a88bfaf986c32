"""What of a noise probe's effect is rounding: the same noise at energies that differ by 10,000.

    python -m benchmarks.probe_floor --model DIR --spool DIR --data DIR [--dtype bfloat16]
                                     [--out benchmarks/results/probe-floor.json]

Essays of the calibration part are replayed as `kvtc calibrate --sensitivity probe` does it, with
noise in V of layers 0, 5 and 20 and in K of layer 10. *energy* is over the variance of that K or V;
the probe takes .02. An effect of sensitivity grows with it, one of rounding does not.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.sensitivity import ROOT
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.evaluation.data.public import Source
from kvtc_vllm.evaluation.probe import layer_deviations
from kvtc_vllm.evaluation.processes.run_probe import CHILD, ProbeJob, ProbeOutcome
from kvtc_vllm.evaluation.processes.suite import run_child
from kvtc_vllm.evaluation.replay.noise import Noise

PLACES: tuple[tuple[Kind, int], ...] = (("v", 0), ("v", 5), ("v", 20), ("k", 10))
ENERGIES = (2e-6, 2e-3, 2e-2)
PREFIX, LENGTH = 640, 704
SCORED = LENGTH - PREFIX - 1
FIRST = 4


def main() -> None:
    """Replay, print and write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.probe_floor", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="directory of the model")
    parser.add_argument("--spool", type=Path, required=True, help="of kvtc calibrate --spool")
    parser.add_argument("--data", type=Path, required=True, help="of the public documents")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/probe-floor.json")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    essays = Source(str(args.data), "calibrate").documents("essays")
    encoded = (tokenizer.encode(essay.content["text"]) for essay in essays)
    documents = [ids[:LENGTH] for ids in encoded if len(ids) >= LENGTH][: args.documents]
    deviations = layer_deviations(RankRows([SpoolReader(args.spool / "rank0")], 1, 0, None))
    noises = {
        f"{kind}{layer} {energy:g}": Noise(
            kind=kind,
            layer=layer,
            deviation=energy**0.5 * deviations[kind][layer],
            first=FIRST,
        )
        for kind, layer in PLACES
        for energy in ENERGIES
    }
    job = ProbeJob(
        model=str(args.model),
        documents=documents,
        prefix_tokens=PREFIX,
        noises=noises,
        engine={"max_model_len": 2048, "dtype": args.dtype},
        out="",
    )
    found = run_child(CHILD, "probe_floor", job, ProbeOutcome)
    tokens = SCORED * len(documents)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.probe_floor --model DIR --spool DIR --data DIR "
        f"--dtype {args.dtype} --documents {args.documents}",
        "model": args.model.name,
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "vllm")},
        "unit": "KL in nats per token, by place and energy of the noise",
        "without noise": round(found.floor / tokens, 6),
        "kl": {name: round(effect.kl / tokens, 6) for name, effect in found.effects.items()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
