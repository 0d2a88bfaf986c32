"""Names of what is kept: chunks of a prefix, and the records that they consist of.

A chunk is *prefix-addressed*: its key is a hash of all tokens up to its end, so two chunks with
equal tokens after different prefixes have different keys. A record is what one KV cache group
of the model contributes to a chunk: one blob per rank, with a size, a residency and an eviction
of its own. Indexes, stores and messages know records only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType, cast

ChunkKey = NewType("ChunkKey", bytes)
"""vLLM's hash of the chunk's last block, then the digest of the LoRA adapter if there is one."""

RecordKey = NewType("RecordKey", bytes)
"""The name that a blob is bound to, the same on every rank."""


def record_key(chunk: ChunkKey, group: int) -> RecordKey:
    """Key of a cache group's record of a chunk. The first group's is the chunk's own."""
    return RecordKey(chunk if group == 0 else chunk + bytes((group,)))


def record_keys(chunks: Sequence[ChunkKey], groups: int) -> Sequence[RecordKey]:
    """Keys of the records of all groups, chunk by chunk."""
    if groups == 1:  # as for nearly every model, and lookups are frequent and long
        return cast("Sequence[RecordKey]", chunks)
    return [record_key(chunk, group) for chunk in chunks for group in range(groups)]
