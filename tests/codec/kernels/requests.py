"""Orders to encode and to decode, without the connector whose messages they are in an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Store:
    """A `StoreChunk`."""

    block_ids: Sequence[int]
    start: int
    key: bytes = b""


@dataclass(frozen=True)
class Load:
    """A `LoadChunk`."""

    start: int
    block_ids: Sequence[int]
    first_block: int = 0
    key: bytes = b""
