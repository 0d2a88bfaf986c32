"""Arguments that `kvtc calibrate` and `kvtc fit` share: what to make of captured rows."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, get_args

from kvtc_vllm.calibration.solvers import RANK_CAP, Method
from kvtc_vllm.calibration.step_classes import StepSettings
from kvtc_vllm.calibration.weights import Metric, Tokens
from kvtc_vllm.codec.container import MAX_SINK_TOKENS
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.nesting import MAX_HALVINGS
from kvtc_vllm.codec.v2.plan import MAX_SINK_GAIN
from kvtc_vllm.config import ConfigError

if TYPE_CHECKING:
    from kvtc_vllm.calibration.calibrate import ArtifactSettings


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them; `--tp` is the command's own."""
    add = parser.add_argument
    add("--out", default="calibrations", help="registry directory to write into")
    add("--name", help="directory of the artifact; default: tp{N}-{groups}-{contents}")
    add("--model-name", help="what to call the model; default: MODEL, or its last directory")
    add("--ratios", default="4,8,16,32,64", help="target ratios (default 4,8,16,32,64)")
    add(
        "--codec",
        choices=[name for name, spec in CODECS.items() if spec.needs_artifact],
        default=KvtcCodec.name,
        help="whose artifact to make: kvtc, the paper's, or kvtc2, whose ratios are of real bytes "
        "(default kvtc)",
    )
    add(
        "--kv-basis",
        choices=("each", "shared"),
        help="K and V of a layer group have a basis each, or share one of both, which takes fewer "
        "bytes and more arithmetic; default: shared for kvtc2, each for kvtc, which has no other",
    )
    add(
        "--sinks",
        choices=("finer", "plain"),
        default="finer",
        help="floating attention sinks, if the model has any: coded by finer steps, or like other "
        "tokens; of kvtc2 (default finer)",
    )
    add(
        "--sink-gain",
        type=float,
        help="how much finer those steps are; default: the root of how much more an error in sinks "
        f"costs, where sensitivities were measured, else {StepSettings.sink_gain:g}",
    )
    add(
        "--halvings",
        type=int,
        default=0,
        metavar="N",
        help="beside every ratio N plans of twice the step of the one before, to which a serving "
        "engine can turn stored chunks (`degrade`); of kvtc2 (default 0)",
    )
    add(
        "--sink-tokens",
        type=int,
        help="first positions that are stored exactly; default: those that the capture left out, 4",
    )
    add(
        "--quality-curve",
        action="store_true",
        help="measure what every ratio costs on held-out documents, in transformers, and put it on "
        "the card, which the key `quality` of a serving configuration reads",
    )
    add(
        "--quality",
        type=float,
        metavar="KL",
        help="keep only the highest of --ratios whose measured KL is at most this, in nats per "
        "token, such as 0.002; measures the curve",
    )
    add("--layers-per-group", default="all", help='layers coded together, or "all"')
    add(
        "--basis-parts",
        type=int,
        default=1,
        metavar="N",
        help="few columns of the basis are of all layers, each of the others of one of N runs of "
        "layers alone, so that products on a CPU take less time; of kvtc2 (default 1: all columns "
        "are of all layers)",
    )
    add("--rank-cap", type=int, default=RANK_CAP, help="most basis columns kept")
    add(
        "--method",
        choices=get_args(Method),
        default="auto",
        help="PCA: eigh (exact), subspace (iterates on the covariance), rsvd (on the rows); "
        "default: the fastest by predicted cost",
    )
    add("--simulation-rows", type=int, default=2048, help="rows the allocation quantises")
    add(
        "--key-share",
        type=float,
        help="share of the bits for keys, such as 0.33; default: K and V at the same ratio",
    )
    add(
        "--sensitivity-tokens",
        choices=get_args(Tokens),
        help="what weights are averaged over: all tokens, or ordinary ones, attention sinks left "
        "out; default: ordinary where the artifact protects sinks apart, else all",
    )
    add(
        "--sensitivity-metric",
        choices=get_args(Metric),
        default="layer",
        help="a weight per layer, or per layer and KV head (default layer)",
    )
    add("--device", help="where to fit; default: cuda if there is one")


def artifact_settings(args: argparse.Namespace) -> ArtifactSettings:
    """Parsed arguments as settings. Raises ConfigError, naming the option, for a bad value."""
    from kvtc_vllm.calibration.calibrate import ArtifactSettings
    from kvtc_vllm.calibration.fit_settings import FitSettings

    ratios = _ratios(args.ratios)
    if args.sink_gain is not None and not 1 <= args.sink_gain <= MAX_SINK_GAIN:
        raise ConfigError(f"--sink-gain {args.sink_gain:g}: give 1 to {MAX_SINK_GAIN}")
    if args.codec == Kvtc2Codec.name and args.key_share is not None:
        raise ConfigError(
            f"--key-share {args.key_share:g}: {args.codec} has one step for K and V, which divides "
            "the bytes; leave it out"
        )
    if args.kv_basis == "shared" and not CODECS[args.codec].pairs:
        raise ConfigError(f"--kv-basis shared: {args.codec} has a basis each for K and V")
    if args.sink_tokens is not None and not 0 <= args.sink_tokens <= MAX_SINK_TOKENS:
        raise ConfigError(f"--sink-tokens {args.sink_tokens}: give 0 to {MAX_SINK_TOKENS}")
    if args.quality is not None and not 0 < args.quality < math.inf:
        raise ConfigError(f"--quality {args.quality:g}: give a KL above 0, such as 0.002")
    _check_halvings(args)
    fit = FitSettings(
        method=args.method,
        rank_cap=positive("--rank-cap", args.rank_cap),
        simulation_rows=positive("--simulation-rows", args.simulation_rows),
        key_share=_key_share(args.key_share, min(ratios)),
        device=_device(args.device),
        codec=args.codec,
        protect_sinks=args.sinks == "finer",
        paired=CODECS[args.codec].pairs and args.kv_basis != "each",
        parts=_parts(args),
        steps=StepSettings(halvings=args.halvings),
    )
    return ArtifactSettings(
        ratios=ratios,
        fit=fit,
        tp=None if args.tp is None else positive("--tp", args.tp),
        layers_per_group=_layers_per_group(args.layers_per_group),
        out=args.out,
        name=args.name,
        model_name=args.model_name,
        sensitivity_tokens=args.sensitivity_tokens,
        sensitivity_metric=args.sensitivity_metric,
        sink_gain=args.sink_gain,
        sink_tokens=args.sink_tokens,
        quality=args.quality,
    )


def _check_halvings(args: argparse.Namespace) -> None:
    given = args.halvings
    if not 0 <= given <= MAX_HALVINGS:
        raise ConfigError(f"--halvings {given}: give 0 to {MAX_HALVINGS}")
    if given and args.codec != Kvtc2Codec.name:
        raise ConfigError(f"--halvings {given}: {args.codec} has no steps; give --codec kvtc2")
    if given and args.quality is not None:
        raise ConfigError(
            f"--halvings {given} contradicts --quality {args.quality:g}, which keeps one plan alone"
        )


def _parts(args: argparse.Namespace) -> int:
    given = positive("--basis-parts", args.basis_parts)
    if given > 1 and args.codec != Kvtc2Codec.name:
        raise ConfigError(f"--basis-parts {given}: of --codec {Kvtc2Codec.name} alone")
    return given


def wants_curve(args: argparse.Namespace) -> bool:
    """Whether parsed arguments ask for a quality curve."""
    return bool(args.quality_curve or args.quality is not None)


def positive(option: str, value: int) -> int:
    """The value, if it is at least 1. Raises ConfigError."""
    if value < 1:
        raise ConfigError(f"{option} {value}: give a number of at least 1")
    return value


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


def _device(name: str | None) -> str:
    import torch

    there = torch.cuda.is_available()
    if name is None:
        return "cuda" if there else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ConfigError(f"--device {name!r}: give cpu, cuda or cuda:N")
    if kind == "cuda" and not there:
        raise ConfigError(f"--device {name!r}: there is no GPU that torch can use; give cpu")
    return name
