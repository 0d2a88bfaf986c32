"""A rank's memory tier, with the layer over what is stored that `joint` asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.cpu import delta_coder
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.tiers.blob_store import MemoryStore
from kvtc_vllm.tiers.delta_store import DeltaStore
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.once_store import OnceStore
from kvtc_vllm.tiers.shared_arena import SharedArena, SharedView

logger = logging.getLogger("vllm.kvtc")


def with_joint(
    config: KVTCConfig,
    groups: int,
    device: str,
    foreign: bool = False,
    *,
    one_copy: bool = False,
    says: bool = False,
) -> KVTCConfig:
    """`joint: auto` as what it comes to; anything else as it is. The same on both sides.

    groups: cache groups of the model. device: type of the device that the model is on. foreign:
    chunks are coded by something else than the configured codec. one_copy: ranks are to share one
    copy of all chunks, which saves more. says: log a line.
    """
    if config.joint != "auto":
        return config
    why = _why_not(config, groups, device, foreign)
    if why is None and one_copy:
        why = "latents are kept once for all ranks, of which differences can't be"
    if says and why is None:
        logger.info("kvtc: joint is delta: chunks of the same text are kept as differences")
    elif says:
        logger.info("kvtc: joint is off: %s", why)
    return msgspec.structs.replace(config, joint="delta" if why is None else "off")


def _why_not(config: KVTCConfig, groups: int, device: str, foreign: bool) -> str | None:
    """Why `joint: delta` can't be, or would cost more than it saves; None if it is right."""
    if config.codec != "kvtc2" or foreign:
        return "differences are for codec kvtc2"
    if groups > 1:
        return f"differences are for one cache group, the model has {groups}"
    if device != "cpu":
        return f"differences are made on a CPU, and the codec runs on {device}"
    if config.disk_path is not None and config.disk_write == "behind":
        return "disk_write is behind"
    if config.degrade != "off":
        return f"degrade is {config.degrade}"
    return None if delta_coder() is not None else "numba is not installed"


def make_memory(
    config: KVTCConfig,
    geometry: CacheGeometry,
    codecs: Sequence[ChunkCodec],
    shared: SharedArena | SharedView | None = None,
) -> MemoryStore:
    """A rank's memory tier. codecs: by cache group. shared: of ranks that keep one copy.

    Raises ConfigError where `joint` can't be.
    """
    if isinstance(shared, SharedArena):
        return shared
    if shared is not None:
        return MemoryArena(0)  # the first rank keeps all
    arena = MemoryArena(config.memory_capacity // geometry.ranks)
    if config.joint == "exact":
        return OnceStore(arena, HEADER_BYTES, CHECKSUM_BYTES)
    if config.joint == "delta":
        return _delta_store(arena, config, codecs)
    return arena


def _delta_store(
    memory: MemoryStore, config: KVTCConfig, codecs: Sequence[ChunkCodec]
) -> DeltaStore:
    """Raises ConfigError where it can't be."""
    if len(codecs) > 1:
        raise ConfigError(
            f"joint='delta' is for models with one cache group, this one has {len(codecs)}; set "
            "joint='exact' or 'off'"
        )
    coder = delta_coder()
    if coder is None:
        raise ConfigError("joint='delta' needs numba, which is not installed; install it")
    (codec,) = codecs
    assert isinstance(codec, TransformCodec)
    return DeltaStore(memory, coder(codec.artifact, replace(ENTROPY, level=config.deflate_level)))
