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
from kvtc_vllm.codec.artifact import KINDS, PAIRED, RankArtifact, SectionName
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.transform import chunk_rows, layer_scales, to_cache
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.vllm_cache.layout import PagedLayout

logger = logging.getLogger("vllm.kvtc")

NO_KEY = RecordKey(b"")
"""Of records that are kept nowhere."""
GROSS_FACTOR = 4.0
GROSS_SLACK = 0.05
ROUNDINGS = 4.0
"""A self-test fails above GROSS_FACTOR x held-out + ROUNDINGS x rounding + GROSS_SLACK: one
document's rows scatter around the average, a wrong layout or RoPE gives an error near 1. rounding
is what storing these rows in the cache dtype costs by itself: next to nothing in 16 bits, where
artifacts are calibrated, not in fp8. Rows are rounded on the way in and on the way out; two equal
errors that add up have four times the square of one."""


def run_self_test(
    codec: TransformCodec, transfer: Transfer, probe: Probe, layout: PagedLayout, chunk_tokens: int
) -> dict[SectionName, float]:
    """Round trip of the probe; logs one line and returns the relative squared errors.

    Runs before the engine uses any block; the blocks used are zeroed again.
    Raises ArtifactError on a gross mismatch, and whatever `transfer` fails with.
    """
    k, v, start = _chunk_of(codec, probe, chunk_tokens)
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
        rows = _rows(codec.artifact, before, start, name)
        measured[name] = _error(codec, rows, _rows(codec.artifact, after, start, name), name)
        exact = _rows(unscaled, (k, v), start, name)
        rounding[name] = _error(codec, exact, _rows(codec.artifact, stored, start, name), name)
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
        limit = GROSS_FACTOR * held_out[name] + ROUNDINGS * rounding[name] + GROSS_SLACK
        if not measured[name] <= limit:
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
        rows = _rows(codec.artifact, before, start, kind)
        found, promised = (
            _error(codec, rows, _rows(codec.artifact, chunk, start, kind), kind)
            for chunk in (after, alone)
        )
        if not found <= GROSS_FACTOR * promised + GROSS_SLACK:
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


def _chunk_of(
    codec: TransformCodec, probe: Probe, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Probe rows, repeated to a chunk at positions past the sinks: K post-RoPE and V, float32."""
    artifact = codec.artifact
    index = torch.arange(tokens) % probe.k.shape[0]
    limit = min((rope.max_positions for rope in artifact.ropes), default=2**31)
    start = tokens if limit >= 2 * tokens and tokens >= artifact.sink_tokens else 0
    positions = torch.arange(start, start + tokens)
    pre = probe.k[index].float()
    keys = torch.empty_like(pre)
    for layer, which in enumerate(artifact.layer_rope):
        rope = None if which is None else artifact.ropes[which]
        rows = pre[:, layer].to(rope.cos_sin.device) if rope is not None else pre[:, layer]
        keys[:, layer] = rows if rope is None else rope.apply(rows, positions).cpu()
    return keys, probe.v[index].float(), start


def _stored(
    codec: TransformCodec, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as the engine would write them into its cache."""
    layers = codec.artifact.geometry.num_layers
    scales = {kind: layer_scales(codec.artifact, kind, 0, layers, k.device) for kind in KINDS}
    return to_cache(k, scales["k"], codec.dtype), to_cache(v, scales["v"], codec.dtype)


def _rows(
    artifact: RankArtifact, chunk: tuple[torch.Tensor, torch.Tensor], start: int, name: SectionName
) -> torch.Tensor:
    """Rows of all layers, float32 [T, P]."""
    k, v = chunk
    positions = torch.arange(start, start + k.shape[0], device=k.device)
    groups = range(len(artifact.geometry.layer_groups))
    return torch.cat(
        [chunk_rows(k, v, group, name, artifact, positions) for group in groups], dim=1
    )


def _error(
    codec: TransformCodec, rows: torch.Tensor, other: torch.Tensor, name: SectionName
) -> float:
    """Squared difference over the rows' squared deviation from the mean, as calibrated.

    Both of weighted rows, where the artifact has weights: its held-out errors are of these. name:
    of a section, or a tensor of pairs.
    """
    mean, weights = (x.to(rows.device) for x in _mean_and_weights(codec.artifact, name))
    deviation = (rows - mean) * weights
    total = float(deviation.double().square().sum())
    difference = (rows - other) * weights
    return float(difference.double().square().sum()) / total if total > 0 else 0.0


def _mean_and_weights(
    artifact: RankArtifact, name: SectionName
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows of all layers, float32 [P] each."""
    means, weights = [], []
    for group, own_name in artifact.section_keys():
        section = artifact.sections[group, own_name]
        own = torch.ones_like(section.mean) if section.weights is None else section.weights
        for tensor, part in artifact.geometry.row_parts(group, own_name).items():
            if tensor in name:
                means.append(section.mean[part])
                weights.append(own[part])
    return torch.cat(means), torch.cat(weights)


def held_out_error(codec: TransformCodec, name: SectionName) -> float:
    """Held-out error of the artifact in use, averaged over layer groups."""
    errors = [
        section.heldout_error[codec.ratio]
        for (_, own_name), section in codec.artifact.sections.items()
        if own_name == name
    ]
    return sum(errors) / len(errors)
