"""What the first requests would otherwise wait for, done at start-up.

A kernel is compiled for what its arguments are like, cuBLAS and nvCOMP have state per thread and
stream, and memory comes from the driver when it is first asked for.
"""

from __future__ import annotations

import logging
import time

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.connector.selftest import NO_KEY, unused_blocks
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.vllm_cache.layout import PagedLayout

logger = logging.getLogger("vllm.kvtc")


def try_kernels(transfer: Transfer, layout: PagedLayout, chunk_tokens: int) -> None:
    """Store a chunk with sinks and one without, load them together and alone. Raises what fails."""
    stores, loads = _items(layout, chunk_tokens, 2)
    # A sink rule takes zeros for sinks: what only marked tokens need is then compiled, too.
    layout.zero(stores[0].block_ids)
    blobs = transfer.encode(transfer.stage(stores))
    # An error where a model has positions for one chunk only.
    found = [
        (load, blob)
        for load, blob in zip(loads, blobs, strict=True)
        if not isinstance(blob, CodecError)
    ]
    # Tables on the device are made for the lengths that a step has, and making them waits for it.
    for part in (found, found[:1], found[1:]):
        for error in transfer.load(part):
            if error is not None:
                raise error
    layout.zero(stores[0].block_ids)


def warm_up(
    worker: KVTCWorker,
    layout: PagedLayout,
    group: int,
    chunk_tokens: int,
    step_tokens: int,
    staging: int,
) -> None:
    """Encode and load on every thread that will, on its stream, as much as a full step has.

    layout, group: of a cache group, and its number. step_tokens: most tokens that one step of the
    engine computes. staging: bytes that may be staged at once. A failure is logged: the first
    requests then are slow.
    """
    transfer = worker.transfers[group]
    per_chunk = transfer.staged_bytes(chunk_tokens // layout.block_size)
    chunks = max(2, min(step_tokens // chunk_tokens, staging // per_chunk))
    stores, loads = _items(layout, chunk_tokens, chunks, group)
    started = time.perf_counter()
    try:
        worker.warm_up(stores, loads)
    except Exception:
        logger.exception("kvtc: warming up failed; the first requests will be slow")
        return
    finally:
        layout.zero(stores[0].block_ids)
    logger.info(
        "kvtc: warmed up with %d chunks in %.0f ms", chunks, 1e3 * (time.perf_counter() - started)
    )


def _items(
    layout: PagedLayout, chunk_tokens: int, chunks: int, group: int = 0
) -> tuple[list[StoreItem], list[LoadItem]]:
    """The first chunk of a sequence and `chunks` - 1 times the second, all in the same blocks."""
    blocks = unused_blocks(layout, chunk_tokens)
    starts = [0, *[chunk_tokens] * (chunks - 1)]
    return (
        [StoreItem(NO_KEY, start, blocks, group=group) for start in starts],
        [LoadItem(NO_KEY, start, 0, blocks, group) for start in starts],
    )
