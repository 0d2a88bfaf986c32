"""raw: the payload as it is, in one piece and without units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtc_vllm.codec.entropy.base import EncodedSection, Unit
from kvtc_vllm.codec.errors import ContainerError


@dataclass(frozen=True)
class RawCoder:
    """Stores the concatenated streams."""

    name: str = "raw"
    coder_id: int = 0

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        return EncodedSection(units=(), body=b"".join(streams))

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        if units or len(body) != raw_length:
            raise ContainerError(
                "entropy", f"{len(body)} stored bytes in {len(units)} units, not {raw_length} in 0"
            )
        return bytearray(body)


RAW = RawCoder()
