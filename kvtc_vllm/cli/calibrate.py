"""Fit an artifact for a model: run it in vLLM, capture KV rows, fit, write.

    kvtc calibrate MODEL --data text/ chats.jsonl hf:NAME:SPLIT:COLUMN --out calibrations/

MODEL is a directory or a Hugging Face name in the local cache. The artifact
serves one tensor-parallel size. With --spool, the captured rows are kept: the same command uses
them again, and kvtc fit makes other artifacts of them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from kvtc_vllm.cli.extras import require
from kvtc_vllm.cli.fit_arguments import add_fit_arguments, artifact_settings, positive, wants_curve
from kvtc_vllm.cli.options import add_engine, parse_engine
from kvtc_vllm.config import ConfigError

if TYPE_CHECKING:
    from kvtc_vllm.calibration.sensitivity import SensitivityMeasure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model")
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text or .jsonl files, directories, hf:NAME[:CONFIG]:SPLIT:COLUMN",
    )
    add("--tokens", type=int, default=160_000, help="rows to fit on (default 160000)")
    add("--tp", type=int, default=1, help="tensor-parallel size that will serve")
    add("--max-len", type=int, default=8192, help="longest document in tokens")
    add("--heldout", type=float, default=0.1, help="fraction of documents held out")
    add("--seed", type=int, default=0)
    add(
        "--spool",
        metavar="DIR",
        help="keep captured rows here, and use those that the same settings left; "
        "default: temporary",
    )
    add(
        "--sensitivity",
        choices=("none", "gradient", "probe"),
        default="none",
        help="weigh layers by what an error in their K and V costs: by gradients in transformers, "
        "or by noise in vLLM, which takes longer (default none)",
    )
    add_engine(parser)
    add_fit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate and print where the artifact is."""
    require("kvtc calibrate", "calibrate")
    from kvtc_vllm.calibration.calibrate import calibrate
    from kvtc_vllm.calibration.capture import CaptureSettings
    from kvtc_vllm.calibration.gradients import Gradients, GradientSettings
    from kvtc_vllm.calibration.quality_curve import curve_settings

    capture = CaptureSettings(
        model=args.model,
        data=tuple(args.data),
        tokens=positive("--tokens", args.tokens),
        max_len=positive("--max-len", args.max_len),
        tp=positive("--tp", args.tp),
        heldout_fraction=_fraction("--heldout", args.heldout),
        seed=args.seed,
        engine=parse_engine(args.engine),
    )
    settings = artifact_settings(args)
    if wants_curve(args):
        settings = replace(settings, curve=curve_settings(capture, settings.fit.device))
    sensitivity: SensitivityMeasure | None = None
    if args.sensitivity == "gradient":
        sensitivity = Gradients(capture, GradientSettings(), settings.fit.device)
    if args.sensitivity == "probe":
        require("kvtc calibrate --sensitivity probe", "eval")
        from kvtc_vllm.evaluation.probe import Probe

        sensitivity = Probe(capture)
    made = calibrate(capture, settings, spool=args.spool, sensitivity=sensitivity)
    print(f"artifact: {made}")
    return 0


def _fraction(option: str, value: float) -> float:
    if not 0 < value <= 0.5:
        raise ConfigError(f"{option} {value}: give a fraction above 0 and up to 0.5")
    return value
