"""Artifact -> codec and `Transfer`: kernels where there is a GPU and they work, else torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import CODECS, open_codec
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.selftest import NO_KEY, run_self_test, unused_blocks
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Transfer

logger = logging.getLogger("vllm.kvtc")


@dataclass(frozen=True)
class FoundArtifact:
    """What a rank serves with. probe: rows for the self-test."""

    artifact: RankArtifact
    probe: Probe
    directory: Path


def build_transfer(
    found: FoundArtifact, config: KVTCConfig, layout: PagedLayout, workspace_bytes: int
) -> tuple[TransformCodec, Transfer]:
    """The fastest codec and transfer that work here, self-tested if the configuration says so.

    Raises ArtifactError if the self-test fails by torch operations, too.
    """
    # Kernels take the blocks of one table.
    kernels = config.kernels and CODECS[config.codec].has_kernels and layout.tables == 1
    if kernels and has_kernels(layout.device):
        try:
            return _by_kernels(found, config, layout, workspace_bytes)
        except Exception:
            logger.exception(
                "kvtc: the GPU kernels can't be used here; going on by torch operations, which "
                "are slower (kernels=false avoids the attempt)"
            )
    return _by_torch(found, config, layout)


def has_kernels(device: torch.device) -> bool:
    """Whether they are compiled for this device; on a CPU they would be interpreted."""
    return device.type == "cuda"


def _by_kernels(
    found: FoundArtifact, config: KVTCConfig, layout: PagedLayout, workspace_bytes: int
) -> tuple[TransformCodec, Transfer]:
    # Only here: an engine on a CPU needs no Triton.
    from kvtc_vllm.codec.kernels.paged_codec import PagedKvtcCodec
    from kvtc_vllm.connector.kernel_transfer import KernelTransfer

    codec = PagedKvtcCodec(
        found.artifact,
        config.target_ratio,
        layout.sides(),
        layout.block_size,
        workspace_bytes=workspace_bytes,
    )
    transfer = KernelTransfer(codec, config.chunk_tokens)
    _compile(transfer, layout, config.chunk_tokens)
    if config.self_test:
        run_self_test(codec, transfer, found.probe, layout, config.chunk_tokens)
    return codec, transfer


def _compile(transfer: Transfer, layout: PagedLayout, chunk_tokens: int) -> None:
    """Have every kernel compiled now, by a chunk with sinks and one without, not in a step."""
    blocks = unused_blocks(layout, chunk_tokens)
    stores = [StoreItem(NO_KEY, start, blocks) for start in (0, chunk_tokens)]
    loads = [LoadItem(NO_KEY, item.start, 0, blocks) for item in stores]
    for blob, load in zip(transfer.encode(transfer.stage(stores)), loads, strict=True):
        if not isinstance(blob, CodecError):  # as where a model has positions for one chunk only
            transfer.load([(load, blob)])
    layout.zero(blocks)


def _by_torch(
    found: FoundArtifact, config: KVTCConfig, layout: PagedLayout
) -> tuple[TransformCodec, Transfer]:
    codec = open_codec(
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
    return codec, transfer
