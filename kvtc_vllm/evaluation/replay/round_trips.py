"""Several methods over one exact pass: the tier holds exact KV, and a load encodes and decodes it.

An exact pass costs as much for every method as for one. So it is run once. Its chunks lie in
the tier as they are, and whenever one is loaded, it goes through the encoder and the decoder of
the method whose turn it is. The KV that a replay sees is what it would be if the encoder had run
when the chunk was stored, since a codec is a function of the chunk alone.

A cache of float32 can stand for one of bfloat16, on CPUs that multiply bfloat16 slowly: methods
then get chunks rounded to it, and bytes are of those.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from kvtc_vllm.codec.base import Blob, ChunkCodec, Coder, DecodedChunk


class Turn:
    """Whose turn it is, and what its chunks take. Worker threads count, the engine's reads.

    Bytes are of chunks that were loaded, each counted once for each method and chunk.
    """

    def __init__(self) -> None:
        self.method: str | None = None
        """None: loads give back exact KV."""
        self._lock = threading.Lock()
        self._sizes: dict[bytes, tuple[int, int]] = {}

    def begin(self, method: str | None) -> None:
        """Give the turn to a method, with nothing counted."""
        with self._lock:
            self.method = method
            self._sizes.clear()

    def count(self, key: bytes, raw: int, stored: int) -> None:
        """Note a chunk's bytes before and after encoding."""
        with self._lock:
            self._sizes[key] = raw, stored

    def bytes(self) -> tuple[int, int]:
        """Bytes of all chunks since the turn began, before and after encoding."""
        with self._lock:
            return (
                sum(raw for raw, _ in self._sizes.values()),
                sum(stored for _, stored in self._sizes.values()),
            )


TURN = Turn()
"""Of this process: vLLM makes the codec, out of reach of who owns the engine."""


class RoundTripCodec(Coder):
    """`encode` and `decode` as `ChunkCodec` has them; blobs are exact.

    exact: the bit-exact codec. methods: by name, codecs whose round trip a load makes. held:
    element type that they get and give, to which chunks are rounded; None: the cache's own.
    """

    def __init__(
        self,
        exact: ChunkCodec,
        methods: Mapping[str, Coder],
        held: torch.dtype | None = None,
    ) -> None:
        self._exact = exact
        self._methods = methods
        self._held = held

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """One chunk, bit-exact."""
        return self._exact.encode(k, v, start, key)

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """The chunk after the round trip of the method whose turn it is."""
        chunk = self._exact.decode(blob, expect_start, expect_tokens, key)
        if TURN.method is None:
            return chunk
        codec, cache = self._methods[TURN.method], chunk.k.dtype
        held = cache if self._held is None else self._held
        k, v = chunk.k.to(held), chunk.v.to(held)
        coded = codec.encode(k, v, chunk.start, key)
        TURN.count(key, k.nbytes + v.nbytes, len(coded))
        found = codec.decode(coded, chunk.start, chunk.k.shape[0], key)
        return DecodedChunk(found.k.to(cache), found.v.to(cache), found.start)
