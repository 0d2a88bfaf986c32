"""A `Baseline` in the place of a chunk codec, or below one, so that the connector can carry it."""

from __future__ import annotations

import struct

import torch
import xxhash

from kvtc_vllm.codec.base import Blob, Coder, DecodedChunk
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.evaluation.baselines.base import Baseline

_COUNTS = struct.Struct("<IQ")
_LENGTH = struct.Struct("<I")


class BaselineCodec(Coder):
    """`encode` and `decode` as `ChunkCodec` has them.

    Every blob is charged the same header and checksum as one of ours, then a length
    for each part: methods differ by what they store, not by our framing.
    """

    def __init__(self, baseline: Baseline) -> None:
        self._baseline = baseline

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """One chunk, header and checksum included."""
        parts = self._baseline.compress(k.cpu(), v.cpu(), start)
        head = _COUNTS.pack(k.shape[0], start).ljust(HEADER_BYTES, b"\0")
        table = _LENGTH.pack(len(parts)) + b"".join(_LENGTH.pack(len(part)) for part in parts)
        content = b"".join((head, table, *parts))
        return content + xxhash.xxh3_128_digest(content + key)

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """Inverse of `encode`. Raises ContainerError for a blob of another name or place."""
        view = memoryview(blob)
        content = view[:-CHECKSUM_BYTES]
        if xxhash.xxh3_128_digest(bytes(content) + key) != bytes(view[-CHECKSUM_BYTES:]):
            raise ContainerError("checksum", "altered, or kept under another name")
        tokens, start = _COUNTS.unpack_from(content)
        if expect_start not in (None, start) or expect_tokens not in (None, tokens):
            raise ContainerError("geometry", f"{tokens} tokens from {start}")
        (count,) = _LENGTH.unpack_from(content, HEADER_BYTES)
        at = HEADER_BYTES + _LENGTH.size
        lengths = [_LENGTH.unpack_from(content, at + i * _LENGTH.size)[0] for i in range(count)]
        at += count * _LENGTH.size
        parts = []
        for length in lengths:
            parts.append(content[at : at + length])
            at += length
        k, v = self._baseline.restore(parts, tokens, start)
        return DecodedChunk(k, v, start)


class FormCodec(Coder):
    """A codec of a cache that holds a baseline's form of KV: chunks go through the baseline before
    they are encoded and after they are decoded. Bytes are the codec's.
    """

    def __init__(self, form: Baseline, codec: Coder) -> None:
        self._form = form
        self._codec = codec

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """One chunk, of what the form leaves."""
        return self._codec.encode(*self._through(k, v, start), start, key)

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """Inverse of `encode`, in the form again."""
        chunk = self._codec.decode(blob, expect_start, expect_tokens, key)
        k, v = self._through(chunk.k, chunk.v, chunk.start)
        return DecodedChunk(k, v, chunk.start)

    def _through(
        self, k: torch.Tensor, v: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = self._form.compress(k.cpu(), v.cpu(), start)
        return self._form.restore([memoryview(part) for part in parts], k.shape[0], start)
