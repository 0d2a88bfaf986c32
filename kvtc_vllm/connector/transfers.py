"""Artifact -> codec and `Transfer`: kernels where there is a GPU and they work, else torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact, at_ratio
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import CODECS, open_codec
from kvtc_vllm.codec.streams import Event, SideStream
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.selftest import run_self_test
from kvtc_vllm.connector.sizing import MemoryPlan
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.connector.warm_up import try_kernels
from kvtc_vllm.offload.geometry import CacheGroup, codec_geometry
from kvtc_vllm.offload.threads import thread_pool
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.vllm_cache.layout import PagedLayout

logger = logging.getLogger("vllm.kvtc")

Result = TypeVar("Result")


@dataclass(frozen=True)
class FoundArtifact:
    """What a rank serves with. probe: rows for the self-test."""

    artifact: RankArtifact
    probe: Probe
    directory: Path


@dataclass(frozen=True)
class Served:
    """What a rank codes with. resident: bytes that it takes on the device all the time."""

    codec: ChunkCodec
    transfer: Transfer
    resident: int


def build_transfer(
    found: FoundArtifact | None,
    config: KVTCConfig,
    layout: PagedLayout,
    group: CacheGroup,
    plan: Callable[[], MemoryPlan],
    share: int = 1,
) -> Served:
    """The fastest codec and transfer that work here, self-tested if the configuration says so.

    found: None for a codec that needs no artifact. plan: called when the bases are on the device.
    share: cache groups that divide the workspace.
    Raises ArtifactError if the self-test fails by torch operations, too.
    """
    device = layout.device
    if found is not None and device.type != "cpu":
        # Other ratios' columns would take memory, and their blobs have other names.
        found = replace(found, artifact=at_ratio(found.artifact, config.target_ratio))
    # Kernels take the blocks of one table.
    kernels = config.kernels and CODECS[config.codec].has_kernels and layout.tables == 1
    if kernels and has_kernels(device):
        try:
            return on_own_thread(
                device, lambda: _by_kernels(found, config, layout, group, plan, share)
            )
        except Exception:
            logger.exception(
                "kvtc: the GPU kernels can't be used here; going on by torch operations, which "
                "are slower (kernels=false avoids the attempt)"
            )
    return on_own_thread(device, lambda: _by_torch(found, config, layout, group))


def has_kernels(device: torch.device) -> bool:
    """Whether they are compiled for this device; on a CPU they would be interpreted."""
    return device.type == "cuda"


def on_own_thread(device: torch.device, call: Callable[[], Result]) -> Result:
    """What a call gives, on a GPU run on a thread and a stream of its own.

    vLLM calls a connector while it allocates the KV cache, with memory pools for all that its
    thread allocates. Some releases discard those when the engine sleeps, others copy them to the
    host: neither may happen to bases that an encoder still reads. And nvCOMP needs a stream that
    is not the default one.
    """
    if device.type != "cuda":
        return call()
    point = Event(device)

    def run() -> Result:
        with SideStream(device).to_end(point):
            return call()

    with thread_pool("kvtc-start", 1, device) as thread:
        return thread.submit(run).result()


def _by_kernels(
    found: FoundArtifact | None,
    config: KVTCConfig,
    layout: PagedLayout,
    group: CacheGroup,
    plan: Callable[[], MemoryPlan],
    share: int,
) -> Served:
    # Only here: an engine on a CPU needs no Triton.
    from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS, PagedCodec
    from kvtc_vllm.codec.kernels.paged_raw import PagedRawCodec
    from kvtc_vllm.connector.kernel_transfer import KernelTransfer

    codec: PagedCodec | PagedRawCodec
    if found is None:
        codec = PagedRawCodec(codec_geometry(group), layout.sides(), layout.block_size)
    else:
        codec = PAGED_CODECS[found.artifact.codec](
            found.artifact, config.target_ratio, layout.sides(), layout.block_size
        )
    memory = plan()
    codec.workspace_bytes = memory.workspace // share
    transfer = KernelTransfer(codec, config.chunk_tokens)
    try_kernels(transfer, layout, config.chunk_tokens)
    if found is not None and isinstance(codec, PagedCodec) and config.self_test:
        run_self_test(codec, transfer, found.probe, layout, config.chunk_tokens)
    return Served(codec, transfer, codec.resident_bytes)


def _by_torch(
    found: FoundArtifact | None,
    config: KVTCConfig,
    layout: PagedLayout,
    group: CacheGroup,
) -> Served:
    if found is None:
        raw = open_codec(config.codec, group.dtype, geometry=codec_geometry(group))
        return Served(raw, TorchTransfer(layout, raw, config.chunk_tokens), 0)
    codec: TransformCodec = open_codec(
        config.codec,
        layout.dtype,
        artifact=found.artifact,
        ratio=config.target_ratio,
        deflate_level=config.deflate_level,
        device=layout.device,
    )
    transfer = TorchTransfer(layout, codec, config.chunk_tokens)
    if config.self_test:
        run_self_test(codec, transfer, found.probe, layout, config.chunk_tokens)
    return Served(codec, transfer, codec.resident_bytes)
