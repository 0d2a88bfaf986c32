"""Fit another artifact to the rows that `kvtc calibrate --spool DIR` kept.

    kvtc fit DIR --ratios 8,16 --tp 4 --out calibrations/

Neither the model nor the data is needed, but for a quality curve the model. A capture serves every
tensor-parallel size, because the rows of a rank are a slice of the KV heads.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from kvtc_vllm.cli.extras import require
from kvtc_vllm.cli.fit_arguments import add_fit_arguments, artifact_settings, wants_curve
from kvtc_vllm.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("spool", help="what was given as --spool to kvtc calibrate")
    parser.add_argument(
        "--tp", type=int, help="tensor-parallel size that will serve; default: as captured"
    )
    parser.add_argument(
        "--sensitivity",
        metavar="FILE|none",
        help="weigh layers by this file, or not; default: by the one that kvtc calibrate "
        "--sensitivity left in the spool, if it did",
    )
    parser.add_argument(
        "--model", help="the captured model, a directory or hub name; for --quality-curve"
    )
    add_fit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, write and print where the artifact is."""
    require("kvtc fit", "calibrate")
    from kvtc_vllm.calibration.calibrate import fit_spool
    from kvtc_vllm.calibration.quality_curve import CurveSettings
    from kvtc_vllm.calibration.sensitivity import SENSITIVITY_NAME

    spool = Path(args.spool)
    sensitivity: Path | None = None
    if args.sensitivity is None:
        left = spool / SENSITIVITY_NAME
        sensitivity = left if left.exists() else None
    elif args.sensitivity != "none":
        sensitivity = Path(args.sensitivity)
    if sensitivity is not None:
        print(f"layers are weighted by {sensitivity}", flush=True)
    settings = artifact_settings(args)
    if wants_curve(args):
        if args.model is None:
            option = "--quality-curve" if args.quality is None else f"--quality {args.quality:g}"
            raise ConfigError(f"{option}: is measured with the model; give --model MODEL")
        settings = replace(settings, curve=CurveSettings(args.model, settings.fit.device))
    print(f"artifact: {fit_spool(spool, settings, sensitivity)}")
    return 0
