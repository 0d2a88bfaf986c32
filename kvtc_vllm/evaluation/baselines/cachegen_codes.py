"""CacheGen's quantiser: anchor tokens, and deltas to them with bins that widen with depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvtc_vllm.codec.quantizers.base import divisor, to_fp16

TOKEN_GROUP = 10
BIN_WIDTHS = (0.5, 1.0, 1.5)
"""Bin width of deltas in the first, middle and last third of the layers, in root mean
squares of the token's delta. Everything below takes `bins`, a factor of all three."""
ANCHOR_TOP = 127
ANCHOR_SYMBOLS = 2 * ANCHOR_TOP + 1


@dataclass(frozen=True)
class Symbols:
    """Quantised vectors of some tokens: one scale per token and layer.

    values: int32 [n, L, C], not negative. scale: float16 [n, L].
    """

    values: torch.Tensor
    scale: torch.Tensor


def anchor_count(tokens: int) -> int:
    """Anchors of T tokens: the first of every started group."""
    return -(-tokens // TOKEN_GROUP)


def delta_symbols(channels: int, bins: float = 1.0) -> int:
    """Size of the alphabet of deltas of C channels, the same in all layers."""
    return 2 * _delta_top(channels, bins) + 1


def quantize(rows: torch.Tensor, bins: float = 1.0) -> tuple[Symbols, Symbols]:
    """float32 [T, L, C] -> anchors [A, L, C] and deltas [T - A, L, C].

    An anchor is rounded to 255 steps between plus and minus its largest magnitude; a
    delta, to the anchor as it will be restored, in bins of `BIN_WIDTHS`.
    """
    anchors = rows[::TOKEN_GROUP]
    anchor_scale = to_fp16(anchors.abs().amax(dim=-1) / ANCHOR_TOP)
    coded_anchors = Symbols(_round(anchors, anchor_scale, ANCHOR_TOP), anchor_scale)
    is_delta, group = _deltas(len(rows))
    deltas = rows[is_delta] - _dequantize_anchors(coded_anchors)[group]
    delta_scale = to_fp16(deltas.square().mean(dim=-1).sqrt())
    step = delta_scale * _widths(rows.shape[1], bins)
    top = _delta_top(rows.shape[2], bins)
    return coded_anchors, Symbols(_round(deltas, step, top), delta_scale)


def dequantize(anchors: Symbols, deltas: Symbols, bins: float = 1.0) -> torch.Tensor:
    """Inverse of `quantize`: float32 [T, L, C]."""
    restored = _dequantize_anchors(anchors)
    tokens = len(anchors.values) + len(deltas.values)
    rows = restored.new_empty((tokens, *restored.shape[1:]))
    rows[::TOKEN_GROUP] = restored
    is_delta, group = _deltas(tokens)
    step = deltas.scale * _widths(rows.shape[1], bins)
    centred = deltas.values - _delta_top(rows.shape[2], bins)
    rows[is_delta] = restored[group] + centred * step[..., None]
    return rows


def _dequantize_anchors(anchors: Symbols) -> torch.Tensor:
    return (anchors.values - ANCHOR_TOP) * anchors.scale.float()[..., None]


def _deltas(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of T tokens are deltas (bool [T]), and the group of each delta (int64 [T - A])."""
    token = torch.arange(tokens)
    is_delta = token % TOKEN_GROUP != 0
    return is_delta, token[is_delta] // TOKEN_GROUP


def _widths(layers: int, bins: float) -> torch.Tensor:
    """Bin width of each layer: float32 [L]."""
    return bins * torch.tensor(BIN_WIDTHS)[torch.arange(layers) * len(BIN_WIDTHS) // layers]


def _delta_top(channels: int, bins: float) -> int:
    """Largest code of a delta: no element exceeds sqrt(C) root mean squares of C elements."""
    return math.ceil(math.sqrt(channels) / (bins * min(BIN_WIDTHS)))


def _round(x: torch.Tensor, step: torch.Tensor, top: int) -> torch.Tensor:
    """x / step to integers from -top to top, moved up by `top`: int32, shape of x."""
    codes = torch.round(x / divisor(step)).clamp_(-top, top)
    return codes.int() + top
