"""What makes blobs smaller, as the pipelines need it; `connector.halver` makes one."""

from __future__ import annotations

from typing import Protocol

from kvtc_vllm.codec.base import Blob


class Halver(Protocol):
    """Halves blobs. Pure; safe for many threads."""

    @property
    def most_times(self) -> int:
        """How often a blob may be halved."""
        ...

    def times_halved(self, blob: Blob) -> int:
        """How often a blob of the memory tier was halved; 0 for what no plan of ours is of."""
        ...

    def halve(self, blob: Blob, key: bytes) -> bytes:
        """The chunk in about half the bytes, under the same name.

        Raises ContainerError as decoding would, CodecError if it can't be halved.
        """
        ...
