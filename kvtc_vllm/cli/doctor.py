"""Check this machine, or a running server by its metrics.

    kvtc doctor [MODEL] [--ratio 16 | --quality 0.002] [--tp 1]

Versions, plugin, registry, a model's layers and artifact, a round trip. Exit status 1 if something
that serving needs is missing.

    kvtc doctor http://localhost:8000 [--ratio 16]

Is it compressing, and near the target; are stores dropped or loads damaged; hits, memory, disk.
Exit status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from kvtc_vllm.cli.checks import Checks
from kvtc_vllm.cli.server_checks import check_server, is_url, read_page
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.config import ConfigError, preset_names

PACKAGES = ("kvtc-vllm", "torch", "vllm", "isal", "xxhash", "safetensors", "msgspec")
ROUND_TRIP_TOKENS = 128
DEFAULT_RATIO = 16.0
CODED = [name for name, codec in CODECS.items() if codec.needs_artifact]
"""Codecs that have artifacts."""
LENGTHS = (4096, 32768)
"""Tokens of prefixes that a ratio is told for."""
OPTIONAL_PACKAGES = ("lmcache", "nvidia-nvcomp-cu13", "nvidia-nvcomp-cu12", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model", nargs="?", help="directory, Hugging Face name in the cache, or address of a server"
    )
    parser.add_argument("--ratio", type=float, help="target ratio; of an artifact: 16")
    parser.add_argument(
        "--quality",
        type=float,
        help="instead of a ratio, most KL in nats per token: says which ratio an engine would take",
    )
    parser.add_argument("--codec", choices=CODED, help="of the artifact; default: any")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--registry", action="append", default=[], help="further directories")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line per check and a verdict."""
    _check_quality(args)
    checks = Checks(args.json)
    if args.model is not None and is_url(args.model):
        check_server(read_page(args.model), checks, args.ratio)
        return checks.close("the connector is well", "something is wrong, see above")
    _environment(checks)
    _plugin(checks)
    directory, ratio = _registry(args, checks)
    if args.model is not None and ratio is not None:
        _layers(args.model, ratio, checks)
    if directory is not None and ratio is not None:
        _round_trips(directory, ratio, checks)
    return checks.close("everything needed is there", "something needed is missing, see above")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment(checks: Checks) -> None:
    checks.add(None, "python", f"{platform.python_version()} on {platform.machine()}")
    for package in PACKAGES:
        found = _installed(package)
        checks.add(found is not None, package, found or "not installed")
    for package in OPTIONAL_PACKAGES:
        checks.add(None, package, _installed(package) or "not installed (optional)")
    vllm = _installed("vllm")
    if vllm is not None:
        _supported(vllm, checks)
    if torch.cuda.is_available():
        checks.add(None, "gpu", torch.cuda.get_device_name())
    else:
        checks.add(None, "gpu", "none: encoding and decoding run on the CPU")


def _supported(vllm: str, checks: Checks) -> None:
    from kvtc_vllm.vllm_cache.compat import UnsupportedError, check_version

    try:
        check_version(vllm)
    except UnsupportedError as error:
        checks.add(False, "vllm", str(error))
    else:
        checks.add(True, "vllm", f"{vllm} is in the supported range")


def _plugin(checks: Checks) -> None:
    names = [e.value for e in entry_points(group="vllm.general_plugins")]
    found = any(value.startswith("kvtc_vllm.") for value in names)
    checks.add(
        found,
        "plugin",
        "vllm.general_plugins entry point found" if found else "entry point not found: pip install",
    )


def _layers(model: str, ratio: float, checks: Checks) -> None:
    """What the model keeps of a prefix, and the ratio that is to be expected of all of it."""
    from kvtc_vllm.artifact.cache_kinds import RefusedLayersError, expected_ratio, layer_kinds
    from kvtc_vllm.artifact.identity import model_directory

    try:
        config = json.loads((model_directory(model) / "config.json").read_text())
        kinds = layer_kinds(config)
    except RefusedLayersError as error:
        checks.add(False, "layers", str(error))
        return
    except (ArtifactError, OSError, ValueError) as error:
        checks.add(None, "layers", f"not known: {error}")
        return
    for kind in kinds:
        size = f"{kind.token_bytes:,} bytes per token"
        if kind.kind == "latent":
            size += ", kept once for all tensor-parallel ranks (latent_copies)"
        if not kind.coded:
            size = f"{kind.state_bytes:,} bytes per boundary, kept exactly"
        checks.add(None, "layers", f"{kind.layers} x {kind.kind}: {size}")
    expected = ", ".join(
        f"{expected_ratio(kinds, tokens, ratio):.1f}x at {tokens:,} tokens" for tokens in LENGTHS
    )
    checks.add(None, "net ratio", f"of 16-bit elements at {ratio:g}x, before DEFLATE: {expected}")


def _check_quality(args: argparse.Namespace) -> None:
    """Raises ConfigError where it says nothing."""
    if args.quality is None:
        return
    if not 0 < args.quality < math.inf:
        raise ConfigError(f"--quality {args.quality:g}: give a KL above 0, such as 0.002")
    if args.ratio is not None:
        raise ConfigError(
            f"--ratio {args.ratio:g} and --quality {args.quality:g} contradict each other: leave "
            "one out"
        )
    if args.model is None or is_url(args.model):
        raise ConfigError(
            f"--quality {args.quality:g}: give a MODEL, of whose artifact the curve is read"
        )


def _registry(args: argparse.Namespace, checks: Checks) -> tuple[Path | None, float | None]:
    """List artifacts; returns the model's match, or any artifact if no model was given, and the
    target ratio: None where a quality was asked for that no artifact has."""
    from kvtc_vllm.artifact import registry
    from kvtc_vllm.artifact.card import load_card, ratio_within
    from kvtc_vllm.artifact.identity import model_identity

    artifacts: list[Path] = []
    for place in registry.search_path(args.registry):
        for directory, card in registry.scan(place):
            ratios = ",".join(f"{one:g}" for one in card.ratios)
            checks.add(
                None, "artifact", f"{card.model_name} TP {card.tp_size} {ratios}x: {directory}"
            )
            artifacts.append(directory)
    if not artifacts:
        checks.add(None, "artifact", "none found")
    ratio = args.ratio
    if ratio is None and args.quality is None:
        ratio = DEFAULT_RATIO
    if args.model is None:
        return artifacts[0] if artifacts else None, ratio
    try:
        identity = model_identity(args.model)
        match = registry.find(
            identity,
            args.tp,
            ratio,
            model_name=args.model,
            codec=args.codec,
            quality=args.quality,
            registries=args.registry,
        )
    except ArtifactError as error:
        checks.add(False, "match", str(error))
        return None, ratio
    checks.add(True, "match", f"{identity.identity} -> {match}")
    card = load_card(match)
    if args.quality is not None:
        ratio = ratio_within(card, args.quality)
        checks.add(True, "quality", f"{args.quality:g} is {ratio:g}x of {match.name}")
    checks.add(None, "serve", f"kvtc config {_served_by(card.codec_name, args.quality, ratio)}")
    return match, ratio


def _served_by(codec: str, quality: float | None, ratio: float | None) -> str:
    """Arguments of `kvtc config` with which an engine takes an artifact of this codec."""
    any_ratio = f"{codec}-{DEFAULT_RATIO:g}x"
    if quality is not None:
        return f"{any_ratio} quality={quality:g}"
    preset = f"{codec}-{ratio:g}x"
    return preset if preset in preset_names() else f"{any_ratio} ratio={ratio:g}"


def _round_trips(directory: Path, ratio: float, checks: Checks) -> None:
    """Of every part that an engine would load: each rank's, of each cache group."""
    from kvtc_vllm.artifact.card import cache_groups, load_card
    from kvtc_vllm.artifact.directory import group_directory

    for number in range(max(1, len(cache_groups(load_card(directory))))):
        part = group_directory(directory, number)
        try:
            for rank in range(load_card(part).tp_size):
                _round_trip(part, ratio, checks, rank)
        except ArtifactError as error:
            checks.add(False, "round trip", str(error))


def _round_trip(directory: Path, ratio: float, checks: Checks, rank: int = 0) -> None:
    """Encode and decode the artifact's probe on the CPU, and hold it against what it promises."""
    from kvtc_vllm.artifact.directory import load_rank_artifact
    from kvtc_vllm.artifact.round_trip import (
        held_out_error,
        largest_error,
        probe_chunk,
        round_trip_error,
    )
    from kvtc_vllm.codec.frame import TransformCodec
    from kvtc_vllm.codec.registry import open_codec

    artifact, _, probe = load_rank_artifact(directory, rank)
    if ratio not in artifact.ratios():
        ratio = artifact.ratios()[0]
    codec = open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio)
    assert isinstance(codec, TransformCodec)
    k, v, start = probe_chunk(codec, probe, ROUND_TRIP_TOKENS)
    k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
    codec.encode(k, v, start)
    began = time.perf_counter()
    blob = codec.encode(k, v, start)
    encoded = time.perf_counter()
    chunk = codec.decode(blob)
    decoded = time.perf_counter()
    raw = k.nbytes + v.nbytes
    good, errors = True, []
    for name in artifact.section_names:
        error = round_trip_error(codec, (k, v), (chunk.k, chunk.v), start, name)
        held_out = held_out_error(codec, name)
        good = good and error <= largest_error(held_out)
        errors.append(f"{name.upper()} {error:.4f} (held-out {held_out:.4f})")
    checks.add(
        good,
        "round trip",
        f"{directory.name} at {ratio:g}x, rank {rank}: {len(k)} tokens, {raw} -> {len(blob)} bytes "
        f"(ratio {raw / len(blob):.1f}), encode {raw / 1e6 / (encoded - began):.0f} MB/s, "
        f"decode {raw / 1e6 / (decoded - encoded):.0f} MB/s, relative squared error "
        + " ".join(errors),
    )
