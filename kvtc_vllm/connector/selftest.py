"""Start-up self-test: held-out rows of the artifact through the real path.

The rows go into free blocks of the paged cache, are staged, encoded, cleared and
loaded again, and what then lies in the cache is compared with what the
artifact promised. It catches a wrong layout, RoPE or artifact before the first
request does.
"""

from __future__ import annotations

import time

import torch
from vllm.logger import init_logger

from kvtc_vllm.calibration.probe import Probe
from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.transform import chunk_rows
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.messages import LoadItem, StoreItem
from kvtc_vllm.connector.transfer import Transfer

logger = init_logger("vllm.kvtc")

GROSS_FACTOR = 4.0
GROSS_SLACK = 0.05
"""A self-test fails above GROSS_FACTOR x promised + GROSS_SLACK: one document's rows
scatter around the average, a wrong layout or RoPE gives an error near 1."""


def run_self_test(
    codec: KvtcCodec, transfer: Transfer, probe: Probe, layout: PagedLayout, chunk_tokens: int
) -> dict[Kind, float]:
    """Round trip of the probe; logs one line and returns the relative squared errors.

    Runs before the engine uses any block; the blocks used are zeroed again.
    Raises ArtifactError on a gross mismatch, and whatever `transfer` fails with.
    """
    k, v, start = _chunk_of(codec, probe, chunk_tokens)
    blocks = list(range(1, 1 + chunk_tokens // layout.block_size))
    started = time.perf_counter()
    layout.scatter(blocks, k, v)
    before = layout.gather(blocks)
    (blob,) = transfer.encode(transfer.stage([StoreItem(b"", start, blocks)]))
    if isinstance(blob, CodecError):
        raise blob
    layout.zero(blocks)
    (error,) = transfer.load([(LoadItem(b"", start, 0, blocks), blob)])
    if error is not None:
        raise error
    after = layout.gather(blocks)
    layout.zero(blocks)
    seconds = time.perf_counter() - started

    raw = sum(x.nbytes for x in before)
    measured = {kind: _error(codec, before, after, start, kind) for kind in KINDS}
    promised = {kind: _promised(codec, kind) for kind in KINDS}
    logger.info(
        "kvtc: self-test %d tokens: ratio %.1f (%d -> %d bytes), relative squared error "
        "K %.4f (promised %.4f) V %.4f (promised %.4f), %.0f ms",
        chunk_tokens,
        raw / len(blob),
        raw,
        len(blob),
        measured["k"],
        promised["k"],
        measured["v"],
        promised["v"],
        seconds * 1e3,
    )
    for kind in KINDS:
        if not measured[kind] <= GROSS_FACTOR * promised[kind] + GROSS_SLACK:
            raise ArtifactError(
                f"self-test failed: relative squared error of {kind.upper()} is "
                f"{measured[kind]:.3f}, the artifact promises {promised[kind]:.3f}; the artifact "
                "does not fit this model or the KV cache layout is not the one that was calibrated"
            )
    return measured


def _chunk_of(
    codec: KvtcCodec, probe: Probe, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Probe rows, repeated to a chunk, as the cache would hold them at positions past the sinks."""
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
    return keys.to(codec.dtype), probe.v[index].to(codec.dtype), start


def _error(
    codec: KvtcCodec,
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
    start: int,
    kind: Kind,
) -> float:
    """Sum over groups of squared error over squared deviation from the mean, as calibrated."""
    artifact = codec.artifact
    positions = torch.arange(start, start + before[0].shape[0], device=before[0].device)
    error = total = 0.0
    for group in range(len(artifact.geometry.layer_groups)):
        rows = [chunk_rows(k, v, group, kind, artifact, positions) for k, v in (before, after)]
        mean = artifact.sections[group, kind].mean.to(rows[0].device)
        error += float((rows[0] - rows[1]).double().square().sum())
        total += float((rows[0] - mean).double().square().sum())
    return error / total if total > 0 else 0.0


def _promised(codec: KvtcCodec, kind: Kind) -> float:
    """Held-out error, averaged over layer groups."""
    errors = [
        section.heldout_error[codec.ratio]
        for (_, section_kind), section in codec.artifact.sections.items()
        if section_kind == kind
    ]
    return sum(errors) / len(errors)
