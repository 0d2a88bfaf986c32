"""Check this machine: versions, plugin, registry, a model's layers and artifact, a round trip.

    kvtc doctor [MODEL] [--ratio 16] [--tp 1]

Exit status 1 if something that serving needs is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import torch

from kvtc_vllm.codec.errors import ArtifactError

PACKAGES = ("kvtc-vllm", "torch", "vllm", "isal", "xxhash", "safetensors", "msgspec")
LENGTHS = (4096, 32768)
"""Tokens of prefixes that a ratio is told for."""
OPTIONAL_PACKAGES = ("lmcache", "nvidia-nvcomp-cu13", "nvidia-nvcomp-cu12", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", nargs="?", help="directory or Hugging Face name in the cache")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--registry", action="append", default=[], help="further directories")


def run(args: argparse.Namespace) -> int:
    """Print one line per check."""
    healthy = _environment()
    healthy &= _plugin()
    if args.model is not None:
        _layers(args.model, args.ratio)
    directory = _registry(args)
    if args.model is not None:
        healthy &= directory is not None
    if directory is not None:
        healthy &= _round_trip(directory, args.ratio)
    print("everything needed is there" if healthy else "something needed is missing, see above")
    return 0 if healthy else 1


def _line(good: bool | None, topic: str, text: str) -> bool:
    mark = {True: "ok  ", False: "BAD ", None: "info"}[good]
    print(f"{mark} {topic:11} {text}")
    return good is not False


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> bool:
    _line(None, "python", f"{platform.python_version()} on {platform.machine()}")
    healthy = True
    for package in PACKAGES:
        found = _installed(package)
        healthy &= _line(found is not None, package, found or "not installed")
    for package in OPTIONAL_PACKAGES:
        _line(None, package, _installed(package) or "not installed (optional)")
    vllm = _installed("vllm")
    if vllm is not None:
        healthy &= _supported(vllm)
    if torch.cuda.is_available():
        _line(None, "gpu", torch.cuda.get_device_name())
    else:
        _line(None, "gpu", "none: encoding and decoding run on the CPU")
    return healthy


def _supported(vllm: str) -> bool:
    from kvtc_vllm.connector.compat import UnsupportedError, check_version

    try:
        check_version(vllm)
    except UnsupportedError as error:
        return _line(False, "vllm", str(error))
    return _line(True, "vllm", f"{vllm} is in the supported range")


def _plugin() -> bool:
    names = [e.value for e in entry_points(group="vllm.general_plugins")]
    found = any(value.startswith("kvtc_vllm.") for value in names)
    return _line(
        found,
        "plugin",
        "vllm.general_plugins entry point found" if found else "entry point not found: pip install",
    )


def _layers(model: str, ratio: float) -> None:
    """What the model keeps of a prefix, and the ratio that is to be expected of all of it."""
    from kvtc_vllm.artifact.cache_kinds import expected_ratio, layer_kinds
    from kvtc_vllm.artifact.identity import model_directory

    try:
        config = json.loads((model_directory(model) / "config.json").read_text())
        kinds = layer_kinds(config)
    except (ArtifactError, OSError, ValueError) as error:
        _line(None, "layers", f"not known: {error}")
        return
    for kind in kinds:
        size = f"{kind.token_bytes:,} bytes per token"
        if not kind.coded:
            size = f"{kind.state_bytes:,} bytes per boundary, kept exactly"
        _line(None, "layers", f"{kind.layers} x {kind.kind}: {size}")
    expected = ", ".join(
        f"{expected_ratio(kinds, tokens, ratio):.1f}x at {tokens:,} tokens" for tokens in LENGTHS
    )
    _line(None, "net ratio", f"of 16-bit elements at {ratio:g}x, before DEFLATE: {expected}")


def _registry(args: argparse.Namespace) -> Path | None:
    """List artifacts; returns the model's match, or any artifact if no model was given."""
    from kvtc_vllm.artifact import registry
    from kvtc_vllm.artifact.identity import model_identity

    artifacts: list[Path] = []
    for place in registry.search_path(args.registry):
        for directory, card in registry.scan(place):
            ratios = ",".join(f"{ratio:g}" for ratio in card.ratios)
            _line(None, "artifact", f"{card.model_name} TP {card.tp_size} {ratios}x: {directory}")
            artifacts.append(directory)
    if not artifacts:
        _line(None, "artifact", "none found")
    if args.model is None:
        return artifacts[0] if artifacts else None
    try:
        identity = model_identity(args.model)
        match = registry.find(
            identity, args.tp, args.ratio, model_name=args.model, registries=args.registry
        )
    except ArtifactError as error:
        _line(False, "match", str(error))
        return None
    _line(True, "match", f"{identity.identity} -> {match}")
    return match


def _round_trip(directory: Path, ratio: float) -> bool:
    """Encode and decode the artifact's probe on the CPU."""
    from kvtc_vllm.artifact.directory import load_rank_artifact
    from kvtc_vllm.codec.registry import open_codec

    artifact, _, probe = load_rank_artifact(directory, 0)
    if ratio not in artifact.ratios():
        ratio = artifact.ratios()[0]
    codec = open_codec(artifact.codec, torch.bfloat16, artifact=artifact, ratio=ratio)
    k, v = probe.k.to(torch.bfloat16), probe.v.to(torch.bfloat16)
    start = artifact.sink_tokens
    codec.encode(k, v, start)
    began = time.perf_counter()
    blob = codec.encode(k, v, start)
    encoded = time.perf_counter()
    chunk = codec.decode(blob)
    decoded = time.perf_counter()
    raw = k.nbytes + v.nbytes
    error = float((chunk.v.float() - v.float()).square().sum() / v.float().square().sum())
    return _line(
        error < 0.5,
        "round trip",
        f"{directory.name} at {ratio:g}x: {k.shape[0]} tokens, {raw} -> {len(blob)} bytes "
        f"(ratio {raw / len(blob):.1f}), encode {raw / 1e6 / (encoded - began):.0f} MB/s, "
        f"decode {raw / 1e6 / (decoded - encoded):.0f} MB/s, squared error of V {error:.4f}",
    )
