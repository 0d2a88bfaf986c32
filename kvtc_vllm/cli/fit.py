"""Fit another artifact to the rows that `kvtc calibrate --spool DIR` kept.

    kvtc fit DIR --ratios 8,16 --tp 4 --out calibrations/

Neither the model nor the data is needed. A capture serves every tensor-parallel size, because the
rows of a rank are a slice of the KV heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtc_vllm.cli.extras import require
from kvtc_vllm.cli.fit_arguments import add_fit_arguments, artifact_settings


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
    add_fit_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fit, write and print where the artifact is."""
    require("kvtc fit", "calibrate")
    from kvtc_vllm.calibration.calibrate import fit_spool
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
    print(f"artifact: {fit_spool(spool, artifact_settings(args), sensitivity)}")
    return 0
