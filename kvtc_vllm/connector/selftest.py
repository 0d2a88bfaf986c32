"""Start-up self-test: held-out rows of the artifact through the real path.

The rows go into free blocks of the paged cache, are staged, encoded, cleared and
loaded again, and what then lies in the cache is compared with what the
artifact promised. It catches a wrong layout, RoPE or artifact before the first
request does.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.artifact.round_trip import (
    all_rows,
    held_out_error,
    largest_error,
    probe_chunk,
    round_trip_error,
    squared_error,
)
from kvtc_vllm.codec.artifact import KINDS, PAIRED, SectionName
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.transform import layer_scales, to_cache
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.vllm_cache.layout import PagedLayout

logger = logging.getLogger("vllm.kvtc")

NO_KEY = RecordKey(b"")
"""Of records that are kept nowhere."""


def run_self_test(
    codec: TransformCodec, transfer: Transfer, probe: Probe, layout: PagedLayout, chunk_tokens: int
) -> dict[SectionName, float]:
    """Round trip of the probe; logs one line and returns the relative squared errors.

    Runs before the engine uses any block; the blocks used are zeroed again.
    Raises ArtifactError on a gross mismatch, and whatever `transfer` fails with.
    """
    k, v, start = probe_chunk(codec, probe, chunk_tokens)
    stored = _stored(codec, k, v)
    blocks = unused_blocks(layout, chunk_tokens)
    started = time.perf_counter()
    layout.scatter(blocks, *stored)
    before = layout.gather(blocks)
    (blob,) = transfer.encode(transfer.stage([StoreItem(NO_KEY, start, blocks)]))
    if isinstance(blob, CodecError):
        raise blob
    layout.zero(blocks)
    (error,) = transfer.load([(LoadItem(NO_KEY, start, 0, blocks), blob)])
    if error is not None:
        raise error
    after = layout.gather(blocks)
    layout.zero(blocks)
    seconds = time.perf_counter() - started

    raw = sum(x.nbytes for x in before)
    unscaled = replace(codec.artifact, scales=None)
    measured: dict[SectionName, float] = {}
    rounding: dict[SectionName, float] = {}
    names = codec.artifact.section_names
    for name in names:
        measured[name] = round_trip_error(codec, before, after, start, name)
        exact = all_rows(unscaled, (k, v), start, name)
        rounding[name] = squared_error(
            codec, exact, all_rows(codec.artifact, stored, start, name), name
        )
    held_out = {name: held_out_error(codec, name) for name in names}
    dtype = str(codec.dtype).removeprefix("torch.")
    logger.info(
        "kvtc: self-test %d tokens: ratio %.1f (%d -> %d bytes), relative squared error "
        "%s, %.0f ms",
        chunk_tokens,
        raw / len(blob),
        raw,
        len(blob),
        " ".join(
            f"{name.upper()} {measured[name]:.4f} (held-out {held_out[name]:.4f}, {dtype} "
            f"{rounding[name]:.4f})"
            for name in names
        ),
        seconds * 1e3,
    )
    for name in names:
        if not measured[name] <= largest_error(held_out[name], rounding[name]):
            raise ArtifactError(
                f"self-test failed: relative squared error of {name.upper()} is "
                f"{measured[name]:.3f}, calibration measured {held_out[name]:.3f} and {dtype} "
                f"costs {rounding[name]:.3f}; the artifact does not fit this model or the KV cache "
                "layout is not the one that was calibrated"
            )
    if names == PAIRED:
        _check_parts(codec, before, after, start)
    return measured


def _check_parts(
    codec: TransformCodec,
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
    start: int,
) -> None:
    """Raise ArtifactError if K or V of pairs is not what the codec by itself makes of it.

    V of SmolLM2 has a fifth of the energy of weighted pairs: without any of it the error of both is
    still one that high ratios are allowed.
    """
    decoded = codec.decode(codec.encode(*before, start), start, len(before[0]))
    alone = decoded.k.to(before[0].device), decoded.v.to(before[1].device)
    for kind in KINDS:
        found, promised = (
            round_trip_error(codec, before, chunk, start, kind) for chunk in (after, alone)
        )
        if not found <= largest_error(promised):
            raise ArtifactError(
                f"self-test failed: relative squared error of {kind.upper()} is {found:.3f}, the "
                f"codec without the KV cache gives {promised:.3f}; the layout of the KV cache is "
                "not the one that was calibrated"
            )


def unused_blocks(layout: PagedLayout, tokens: int) -> list[int]:
    """Blocks for so many tokens, free before the first step; block 0 is vLLM's own.

    Other ones for each block table: layers of different tables share memory.
    """
    return list(range(1, 1 + layout.tables * (tokens // layout.block_size)))


def _stored(
    codec: TransformCodec, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as the engine would write them into its cache."""
    layers = codec.artifact.geometry.num_layers
    scales = {kind: layer_scales(codec.artifact, kind, 0, layers, k.device) for kind in KINDS}
    return to_cache(k, scales["k"], codec.dtype), to_cache(v, scales["v"], codec.dtype)
