"""What makes cold chunks smaller, if the configuration asks for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.cpu import requantiser
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.offload.halver import Halver

logger = logging.getLogger("vllm.kvtc")


def make_halver(
    config: KVTCConfig, codecs: Sequence[ChunkCodec], device: torch.device
) -> Halver | None:
    """What `degrade` asks for; None if nothing. codecs: by cache group.

    Raises ConfigError where nothing can be halved, ArtifactError for an artifact whose plans are
    not nested.
    """
    if config.degrade == "off":
        return None
    asked = config.degrade
    if device.type != "cpu":
        raise ConfigError(
            f"degrade={asked!r} is for engines on a CPU: on {device.type} the bases of one ratio "
            "alone are resident, so halved chunks could not be loaded; set degrade='off'"
        )
    if len(codecs) > 1:
        raise ConfigError(
            f"degrade={asked!r} is for models with one cache group, this one has {len(codecs)}; "
            "set degrade='off'"
        )
    make = requantiser()
    if make is None:
        raise ConfigError(f"degrade={asked!r} needs numba, which is not installed; install it")
    # Only now: it imports numba.
    from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec

    (codec,) = codecs
    assert isinstance(codec, CpuKvtc2Codec)
    entropy = replace(ENTROPY, level=config.deflate_level)
    halver = make(codec, entropy, config.degrade_floor or math.inf)
    for ratio in halver.ratios:
        codec.sections(ratio)  # so that no load waits until they are made
    logger.info(
        "kvtc: cold chunks are halved before any is evicted: %s",
        " to ".join(f"{ratio:g}x" for ratio in halver.ratios),
    )
    return halver
