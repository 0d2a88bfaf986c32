"""Bytes of a record on each rank, as one object that Python's cycle collector does not visit."""

from __future__ import annotations

import struct
from collections.abc import Sequence


class RankSizes:
    """Packs and unpacks the sizes of a record. ranks: at least 1. Sizes: 0 to 2**63 - 1 bytes."""

    def __init__(self, ranks: int) -> None:
        self._struct = struct.Struct(f"<{ranks}q")

    def pack(self, sizes: Sequence[int]) -> bytes:
        """One size per rank, in order."""
        return self._struct.pack(*sizes)

    def unpack(self, packed: bytes) -> tuple[int, ...]:
        """The sizes again."""
        return self._struct.unpack(packed)
