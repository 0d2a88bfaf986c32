"""CacheGen as LMCache ships it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.entropy import decode_columns, encode_columns, histogram
from kvtc_vllm.evaluation.baselines.formats import from_bytes, to_cache

FINE_BINS = 32
COARSE_BINS = 16
FINE_KEY_LAYERS = 10
FINE_VALUE_LAYERS = 2
CDF_TOP = 0xFFFF

_SECTION_PARTS = 3


class CacheGenLmcache(Baseline):
    """`remote_serde: cachegen` of LMCache 0.5.6, a model its table does not name.

    Followed: no anchors and no deltas. A token's keys (values) of one layer are divided
    by their largest magnitude and rounded to bins / 2 - 1 steps either way: 32 bins in
    the first 10 layers for keys and the first 2 for values, 16 after them; 32 everywhere
    in a model of fewer than 10 layers. Distributions a layer and channel are counted
    over the chunk and travel with it as 16-bit cumulative tables.
    Charged: one maximum per token, layer and K or V in the cache dtype; the tables, bins + 1
    entries of 16 bits per layer and channel, as LMCache stores them; the coded bins.
    Departures: LMCache codes every channel and 256 tokens as a stream of its own,
    stores 32-bit lengths for them and pickles the whole; here one stream holds all
    channels and nothing of that is charged, which saves LMCache 2 to 3 %. A token whose
    keys are all zero is stored as zeros; LMCache divides zero by zero there. What comes
    back is otherwise LMCache's bit for bit.
    """

    name = "cachegen-lmcache"
    source = "LMCache 0.5.6 remote_serde=cachegen, default bins for models not in its table"

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        parts: list[bytes] = []
        for x, bins in ((k, self._key_bins()), (v, self._value_bins())):
            codes, largest = quantize(x.flatten(2), bins)
            columns = codes.flatten(1)
            table = cumulative_table(histogram(columns, int(bins.max())))
            parts += [
                to_bytes(largest),
                table.tobytes(),
                encode_columns(columns, _probabilities(table)),
            ]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        key_parts, value_parts = parts[:_SECTION_PARTS], parts[_SECTION_PARTS:]
        k = self._restore(key_parts, tokens, g.head_size, self._key_bins())
        v = self._restore(value_parts, tokens, g.head_size_v, self._value_bins())
        return k, v

    def _restore(
        self, parts: Sequence[memoryview], tokens: int, head_size: int, bins: torch.Tensor
    ) -> torch.Tensor:
        g = self.geometry
        shape = (tokens, g.num_layers, g.num_kv_heads * head_size)
        largest = from_bytes(parts[0], self.dtype, shape[:2])
        table = np.frombuffer(parts[1], dtype="<u2").reshape(shape[1] * shape[2], -1)
        codes = decode_columns(parts[2], _probabilities(table), tokens).view(shape)
        x = dequantize(codes, largest, bins)
        return to_cache(x.view(*shape[:2], g.num_kv_heads, head_size), self.dtype)

    def _key_bins(self) -> torch.Tensor:
        return layer_bins(self.geometry.num_layers, FINE_KEY_LAYERS)

    def _value_bins(self) -> torch.Tensor:
        return layer_bins(self.geometry.num_layers, FINE_VALUE_LAYERS)


def layer_bins(layers: int, fine_layers: int) -> torch.Tensor:
    """Bins of each layer: int64 [L]."""
    if layers < FINE_KEY_LAYERS:
        return torch.full((layers,), FINE_BINS)
    return torch.where(torch.arange(layers) < fine_layers, FINE_BINS, COARSE_BINS)


def quantize(x: torch.Tensor, bins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cache dtype [T, L, C] -> codes int8 [T, L, C] below bins - 1, maxima [T, L]."""
    centre = (bins // 2 - 1).float()
    largest = x.abs().amax(dim=-1)
    # The quotient first, then the product, as in LMCache: the codes are to be the same.
    steps = (centre / largest.float()).masked_fill_(largest == 0, 0.0)
    codes = torch.round(x.float() * steps[..., None] + centre[:, None])
    return codes.to(torch.int8), largest


def dequantize(codes: torch.Tensor, largest: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize`: float32 [T, L, C]."""
    centre = (bins // 2 - 1).float()[:, None]
    return (codes - centre) / centre * largest.float()[..., None]


def cumulative_table(counts: torch.Tensor) -> npt.NDArray[np.uint16]:
    """Counts [columns, bins] -> cumulative tables [columns, bins + 1] from 0 to `CDF_TOP`.

    Strictly increasing, so that no symbol has probability zero.
    """
    columns, bins = counts.shape
    cumulative = torch.zeros(columns, bins + 1, dtype=torch.int64)
    cumulative[:, 1:] = counts.cumsum(dim=1)
    scaled = (CDF_TOP - bins) * cumulative // cumulative[:, -1:]
    return (scaled + torch.arange(bins + 1)).numpy().astype("<u2")


def _probabilities(table: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Cumulative tables -> [columns, bins], proportional to the probabilities."""
    return np.diff(table.astype(np.int32), axis=1).astype(np.float32)
