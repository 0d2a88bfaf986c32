"""Noise of known energy in one layer's K or V, in the place of a codec."""

from __future__ import annotations

import threading

import msgspec
import torch
import xxhash

from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.base import Blob, ChunkCodec, Coder, DecodedChunk
from kvtc_vllm.codec.sink_rule import SinkRule


class Noise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a load adds.

    group, kind, layer: where; the layer counts in its cache group. deviation: of the normal noise
    in every element, in the cache's units. first: positions before it stay exact. rule: tokens
    that it marks stay exact as well.
    """

    group: int = 0

    kind: Kind
    layer: int
    deviation: float
    first: int
    rule: SinkRule | None = None


class Tally:
    """What noise was given out. Worker threads count, the engine's reads; each chunk counts once.

    It is of this process: vLLM makes the codec, out of reach of who owns the engine.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[bytes, tuple[float, int]] = {}

    def clear(self) -> None:
        """Count from nothing."""
        with self._lock:
            self._chunks.clear()

    def count(self, key: bytes, energy: float, tokens: int) -> None:
        """Note a chunk's sum of squared noise, and its tokens that have any."""
        with self._lock:
            self._chunks[key] = energy, tokens

    def total(self) -> tuple[float, int]:
        """Energy and tokens of all chunks."""
        with self._lock:
            chunks = list(self._chunks.values())
        return sum(energy for energy, _ in chunks), sum(tokens for _, tokens in chunks)


TALLY = Tally()


class NoiseCodec(Coder):
    """Stores chunks bit-exact and adds noise to what is loaded; equal names get equal noise."""

    def __init__(self, exact: ChunkCodec, noise: Noise) -> None:
        self._exact = exact
        self._noise = noise

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
        """The chunk with noise; how much, after rounding to the cache's type, goes into `TALLY`."""
        chunk = self._exact.decode(blob, expect_start, expect_tokens, key)
        noise = self._noise
        noisy = chunk.start + torch.arange(chunk.k.shape[0]) >= noise.first
        if noise.rule is not None:
            noisy &= ~noise.rule.marks(chunk.v).cpu()
        whole = (chunk.k if noise.kind == "k" else chunk.v).clone()
        seed = xxhash.xxh3_64_intdigest(key + f"{noise.kind}{noise.layer}".encode())
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        clean = whole[:, noise.layer].cpu()
        drawn = torch.randn(clean.shape, generator=generator) * noise.deviation
        changed = torch.where(noisy[:, None, None], clean.float() + drawn, clean.float())
        changed = changed.to(clean.dtype)
        energy = float((changed.double() - clean.double()).square().sum())
        TALLY.count(key, energy, int(noisy.sum()))
        whole[:, noise.layer] = changed.to(whole.device)
        if noise.kind == "k":
            return DecodedChunk(whole, chunk.v, chunk.start)
        return DecodedChunk(chunk.k, whole, chunk.start)
