"""Fit an artifact for a model: run it in vLLM, capture KV rows, fit, write.

    kvtc calibrate MODEL --data text/ chats.jsonl hf:NAME:SPLIT:COLUMN --out calibrations/

MODEL is a directory or a Hugging Face name in the local cache. The artifact
serves one tensor-parallel size.
"""

from __future__ import annotations

import argparse

from kvtc_vllm.cli.extras import require
from kvtc_vllm.cli.options import add_engine, parse_engine
from kvtc_vllm.config import ConfigError


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
    add("--out", default="calibrations", help="registry directory to write into")
    add("--name", help="directory of the artifact; default: tp{N}-{groups}-{contents}")
    add("--model-name", help="what to call the model; default: MODEL, or its last directory")
    add("--tokens", type=int, default=160_000, help="rows to fit on (default 160000)")
    add("--ratios", default="4,8,16,32,64", help="target ratios (default 4,8,16,32,64)")
    add("--layers-per-group", default="all", help='layers coded together, or "all"')
    add("--tp", type=int, default=1, help="tensor-parallel size that will serve")
    add("--max-len", type=int, default=8192, help="longest document in tokens")
    add("--rank-cap", type=int, default=10_000, help="most basis columns kept")
    add("--method", choices=("auto", "eigh", "rsvd"), default="auto")
    add("--simulation-rows", type=int, default=2048, help="rows the allocation quantises")
    add(
        "--key-share",
        type=float,
        help="share of the bits for keys, such as 0.33; default: K and V at the same ratio",
    )
    add("--heldout", type=float, default=0.1, help="fraction of documents held out")
    add("--device", help="where to fit; default: cuda if there is one")
    add("--seed", type=int, default=0)
    add("--spool", help="directory for captured rows, kept; default: temporary")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate and print where the artifact is and what it promises."""
    require("kvtc calibrate", "calibrate")
    from kvtc_vllm.calibration.calibrate import calibrate
    from kvtc_vllm.calibration.capture import CaptureSettings
    from kvtc_vllm.calibration.fit import FitSettings

    capture = CaptureSettings(
        model=args.model,
        data=tuple(args.data),
        tokens=_positive("--tokens", args.tokens),
        max_len=_positive("--max-len", args.max_len),
        tp=_positive("--tp", args.tp),
        layers_per_group=_layers_per_group(args.layers_per_group),
        heldout_fraction=_fraction("--heldout", args.heldout),
        seed=args.seed,
        engine=parse_engine(args.engine),
    )
    ratios = _ratios(args.ratios)
    fit = FitSettings(
        method=args.method,
        rank_cap=_positive("--rank-cap", args.rank_cap),
        simulation_rows=_positive("--simulation-rows", args.simulation_rows),
        key_share=_key_share(args.key_share, min(ratios)),
        device=args.device or _default_device(),
        seed=args.seed,
    )
    directory = calibrate(
        capture,
        fit,
        ratios,
        out=args.out,
        name=args.name,
        model_name=args.model_name,
        spool=args.spool,
    )
    print(f"artifact: {directory}")
    return 0


def _ratios(text: str) -> tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        ratios = ()
    if not ratios or any(ratio <= 1 for ratio in ratios):
        raise ConfigError(f"--ratios {text!r}: give numbers above 1, such as 4,8,16,32,64")
    return ratios


def _layers_per_group(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f'--layers-per-group {text!r}: give "all" or a number of layers')
    return int(text)


def _positive(option: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{option} {value}: give a number of at least 1")
    return value


def _fraction(option: str, value: float) -> float:
    if not 0 < value <= 0.5:
        raise ConfigError(f"{option} {value}: give a fraction above 0 and up to 0.5")
    return value


def _key_share(value: float | None, lowest_ratio: float) -> float | None:
    if value is None:
        return None
    # The larger part must not get more bits than the cache has.
    most = min(lowest_ratio / 2, 1.0)
    if not 1 - most <= value <= most or not 0 < value < 1:
        raise ConfigError(
            f"--key-share {value:g}: give a share above 0 and below 1, and with a ratio of "
            f"{lowest_ratio:g} from {1 - most:g} to {most:g}"
        )
    return value


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
