"""How far weights of `--sensitivity probe` agree with those of gradients.

    python -m benchmarks.probe_agreement --model DIR --spool DIR --texts FILE --gradients FILE
                                         [--documents 4] [--continuation 32]
                                         [--out benchmarks/results/probe-agreement.json]

The spool is what `kvtc calibrate --data FILE --tokens 60000 --max-len 2048 --spool DIR` left; what
the probe finds is kept in it as sensitivity.json, and used again by the same command. --gradients
is the sensitivity.json that `--sensitivity gradient` left. Weights are compared as logarithms, per
layer, K and V together.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.sensitivity import ROOT
from kvtc_vllm.calibration.capture import CaptureSettings, capture_rows
from kvtc_vllm.calibration.gradients import GradientSettings
from kvtc_vllm.calibration.sensitivity import Sensitivity, load_sensitivity
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import KINDS
from kvtc_vllm.evaluation.probe import REPLAY_DTYPE, Probe


def main() -> None:
    """Probe, compare, print and write JSON."""
    parser = argparse.ArgumentParser(prog="benchmarks.probe_agreement", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of the model")
    add("--spool", type=Path, required=True, help="of kvtc calibrate --spool")
    add("--texts", type=Path, required=True, help="what was captured")
    add("--gradients", type=Path, required=True, help="sensitivity.json by gradients")
    add("--tokens", type=int, default=60_000, help="as of the capture")
    add("--max-len", type=int, default=2048, help="as of the capture")
    add("--documents", type=int, default=4)
    add("--continuation", type=int, default=32, help="tokens scored, of every document")
    add("--out", type=Path, default=ROOT / "benchmarks/results/probe-agreement.json")
    args = parser.parse_args()
    capture = CaptureSettings(
        model=str(args.model),
        data=(str(args.texts),),
        tokens=args.tokens,
        max_len=args.max_len,
        engine={"max_model_len": 8192, "dtype": "bfloat16"},
    )
    settings = GradientSettings(documents=args.documents, continuation_tokens=args.continuation)
    record = capture_rows(capture, args.spool)
    header = SpoolReader(args.spool / "rank0").header
    shape = header.geometry.num_layers, header.total_kv_heads
    started = time.monotonic()
    probed = load_sensitivity(Probe(capture, settings).measure(record, args.spool), *shape)
    minutes = (time.monotonic() - started) / 60
    by_gradients = load_sensitivity(args.gradients, *shape)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.probe_agreement --model DIR --spool DIR --texts FILE "
        f"--gradients FILE --documents {args.documents} --continuation {args.continuation}",
        "model": args.model.name,
        "replayed_in": REPLAY_DTYPE,
        "minutes": round(minutes, 1),
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch", "vllm")},
        "marked, probe and gradients": [
            None if found.marked is None else [round(found.marked.share, 4), found.marked.energy]
            for found in (probed, by_gradients)
        ],
    }
    for tokens in ("all", "ordinary"):
        result[tokens] = agreement(probed, by_gradients, tokens)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def agreement(probed: Sensitivity, by_gradients: Sensitivity, tokens: Any) -> dict[str, Any]:
    """Of weights over these tokens. spread: deviation of the logarithm of their ratio."""
    weights = [RowWeights(found, tokens).of_layers() for found in (probed, by_gradients)]
    logs = torch.stack([torch.cat([own[kind] for kind in KINDS]).double().log() for own in weights])
    ranks = logs.argsort(dim=1).argsort(dim=1).double()
    return {
        "correlation of logarithms": round(float(torch.corrcoef(logs)[0, 1]), 3),
        "correlation of ranks": round(float(torch.corrcoef(ranks)[0, 1]), 3),
        "spread": round(float((logs[0] - logs[1]).std()), 3),
        **{
            f"{method} {kind}": [round(float(x), 3) for x in own[kind]]
            for method, own in zip(("probe", "gradients"), weights, strict=True)
            for kind in KINDS
        },
    }


if __name__ == "__main__":
    main()
