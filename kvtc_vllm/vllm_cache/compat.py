"""What differs between the supported vLLM releases, and nothing else."""

from __future__ import annotations

import os
import re

SUPPORTED = ((0, 26), (0, 33))
"""First and last supported minor release."""
CRYPTOGRAPHIC = ("sha256", "sha256_cbor")
"""Algorithms of block hashes whose chain vLLM 0.29 and later start from a fixed text."""
RANDOM = "random"


class UnsupportedError(RuntimeError):
    """This vLLM, model or engine option can't be served; the message says what can."""


def vllm_version() -> str:
    """Version of the installed vLLM."""
    import vllm

    return str(vllm.__version__)


def _release(version: str) -> tuple[int, int]:
    """Major and minor number, (0, 0) of a version without."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def check_version(version: str) -> None:
    """Raise UnsupportedError outside the supported range."""
    if not SUPPORTED[0] <= _release(version) <= SUPPORTED[1]:
        low, high = (".".join(map(str, r)) for r in SUPPORTED)
        raise UnsupportedError(
            f"vLLM {version} is not supported; this release works with {low} to {high}"
        )


def check_failed_loads(version: str) -> None:
    """Raise UnsupportedError if vLLM can't be told which request's load failed."""
    if _release(version) < (0, 30):
        raise UnsupportedError(
            f"models with sliding windows, local chunks or several KV cache groups need vLLM 0.30 "
            f"or later, which can be told of a failed load, and this is {version}; below, "
            "--disable-hybrid-kv-cache-manager makes one group of full attention of most of them"
        )


def hash_seed_fact(version: str, algorithm: str) -> str:
    """What vLLM's chain of block hashes starts from: "seed '0'", or "random".

    vLLM takes PYTHONHASHSEED as a text, whatever it is ("random" and "" too). Without one,
    0.29 and later start from a fixed text, except where the algorithm is not cryptographic.
    """
    seed = os.environ.get("PYTHONHASHSEED")
    if seed is None and _release(version) >= (0, 29) and algorithm in CRYPTOGRAPHIC:
        seed = "vllm-none-hash"
    return RANDOM if seed is None else f"seed {seed!r}"


def check_stable_hashes(version: str, algorithm: str) -> None:
    """Raise UnsupportedError if block hashes would differ after a restart."""
    if hash_seed_fact(version, algorithm) != RANDOM:
        return
    old = _release(version) < (0, 29)
    what = "them" if old else f"those of prefix_caching_hash_algo={algorithm!r}"
    other = "vLLM 0.29 or later" if old else " or ".join(CRYPTOGRAPHIC)
    raise UnsupportedError(
        f"disk_path needs block hashes that survive a restart; vLLM {version} makes {what} at "
        "random unless the environment variable PYTHONHASHSEED is set to a fixed number: "
        f"set PYTHONHASHSEED=0, or use {other}"
    )


def source_of_hits() -> object | None:
    """Label for external cache hits from host memory (vLLM 0.32 and later)."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.HOST
