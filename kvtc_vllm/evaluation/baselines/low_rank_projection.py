"""LoRC and ReCalKV: a layer's rows projected on a few directions that are fixed per model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.codec.transform import keys_from_rows, rows_from_keys
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.baselines.formats import from_bytes, sixteen_bit, to_cache
from kvtc_vllm.evaluation.baselines.statistics import leading
from kvtc_vllm.evaluation.settings import Setting, Settings

LORC_SHARES = (0.3, 0.6)
"""Least and largest share of a layer's width that LoRC keeps; 55 to 60 % less on average."""
LORC_SCALES = Setting(1.0, 0.1, 1 / LORC_SHARES[1])
GROUP_HEADS = 4


class LowRankProjection(FittedBaseline):
    """Rows of one layer, keys before RoPE (given `ropes`), as coordinates in an orthonormal basis.

    Charged: the coordinates in 16 bits. The bases are of the model.
    """

    def prepare(self) -> None:
        self._bases: dict[Kind, list[torch.Tensor]] = {kind: self.bases(kind) for kind in KINDS}

    @abstractmethod
    def bases(self, kind: Kind) -> list[torch.Tensor]:
        """Orthonormal columns [H*D, rank] of each layer."""

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        positions = torch.arange(start, start + len(k))
        parts = []
        for layer, (keys, values) in enumerate(
            zip(self._bases["k"], self._bases["v"], strict=True)
        ):
            span = slice(layer, layer + 1)
            rows = rows_from_keys(k[:, span], self.ropes[span], positions)
            parts += [
                self._stored(rows @ keys),
                self._stored(v[:, layer].float().flatten(1) @ values),
            ]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        positions = torch.arange(start, start + tokens)
        keys, values = [], []
        for layer in range(g.num_layers):
            rows = self._rows(parts[2 * layer], tokens, self._bases["k"][layer])
            ropes = self.ropes[layer : layer + 1]
            keys.append(keys_from_rows(rows, ropes, positions, g.num_kv_heads))
            rows = self._rows(parts[2 * layer + 1], tokens, self._bases["v"][layer])
            values.append(rows.view(tokens, 1, g.num_kv_heads, g.head_size_v))
        return (
            to_cache(torch.cat(keys, dim=1), self.dtype),
            to_cache(torch.cat(values, dim=1), self.dtype),
        )

    def _stored(self, coordinates: torch.Tensor) -> bytes:
        return to_bytes(to_cache(coordinates, sixteen_bit(self.dtype)))

    def _rows(self, part: memoryview, tokens: int, basis: torch.Tensor) -> torch.Tensor:
        shape = (tokens, basis.shape[1])
        return from_bytes(part, sixteen_bit(self.dtype), shape).float() @ basis.T


class Lorc(LowRankProjection):
    """LoRC (arXiv 2410.03111): truncated singular value decompositions of the projections.

    Followed: the basis of a layer is the leading left singular vectors of its key or value
    projection, all KV heads together; no data is seen. Ranks are progressive: a layer's share
    falls linearly with the logarithm of its cumulative condition number, the product of those of
    its own and all later projections, from the largest share for the first layers to the least.
    Keys before RoPE.
    Departures: the paper absorbs the other factor into the query and output projections, which
    saves computation and changes no result but rounding. Shares of 0.3 to 0.6 give the saving of
    55 to 60 % that the paper reports; setting `scale` multiplies both.
    """

    name = "lorc"
    source = (
        "LoRC, arXiv 2410.03111: SVD of K and V projections, progressive, 30 to 60 % of the rank"
    )
    settings: ClassVar[Settings] = {"scale": LORC_SCALES}

    def bases(self, kind: Kind) -> list[torch.Tensor]:
        known = self.statistics
        weights = known.key_weights if kind == "k" else known.value_weights
        both = (known.key_weights, known.value_weights)
        shares = progressive_shares(sum(log_condition(gram) for gram in both))
        shares = self.values["scale"] * shares
        width = weights.shape[-1]
        return [
            leading(gram, max(1, round(share * width)))
            for gram, share in zip(weights, shares.tolist(), strict=True)
        ]


class ReCalKV(LowRankProjection):
    """ReCalKV (arXiv 2505.24357) at half of the rank (setting `share`).

    Followed: key heads are reordered so that similar ones (by centred kernel alignment) share a
    group of four, each group has one decomposition; values of a layer have one of all heads,
    calibrated on data. Keys before RoPE.
    Departures: decompositions are of the second moments of calibration rows, for keys as well,
    where the paper decomposes weights that such moments whiten: the best approximation of the
    same data by that rank. Ranks are the same in every layer; the authors (`fisher_uniform` in
    palu/rank_search.py of github.com/XIANGLONGYAN/ReCalKV) allot the ranks of all key and value
    projections together in proportion to their Fisher information, the root mean square gradient
    of a weight averaged over weights, and round them to multiples of 32. Similarity is that of
    rows, which is that of the authors' whitened weights but for their means; they group the most
    alike pairs first, here the first head left takes those most like it. With four KV heads or
    fewer there is one group either way.
    """

    name = "recalkv"
    source = (
        "ReCalKV, arXiv 2505.24357: grouped heads for keys, calibrated values, half of the rank"
    )
    settings: ClassVar[Settings] = {"share": Setting(0.5, 0.01, 1)}

    def bases(self, kind: Kind) -> list[torch.Tensor]:
        g = self.geometry
        share = self.values["share"]
        if kind == "v":
            rank = max(1, round(share * self.statistics.value_rows.shape[-1]))
            return list(leading(self.statistics.value_rows, rank))
        return [
            _grouped_basis(moments, g.num_kv_heads, share) for moments in self.statistics.key_rows
        ]


def log_condition(grams: torch.Tensor) -> torch.Tensor:
    """Logarithm of the ratio of largest to smallest singular value, of W W^T [L, n, n]: [L]."""
    eigenvalues = torch.linalg.eigvalsh(grams)
    largest = eigenvalues[:, -1].clamp_min(torch.finfo(grams.dtype).tiny)
    # A smallest one below rounding says no more than that.
    floor = largest * torch.finfo(grams.dtype).eps
    return 0.5 * (largest.log() - eigenvalues[:, 0].clamp_min(floor).log())


def progressive_shares(log_conditions: torch.Tensor | int) -> torch.Tensor:
    """Share of the width that each layer keeps: [L], largest for the first layer.

    log_conditions: [L], of each layer's projections.
    """
    least, largest = LORC_SHARES
    own = torch.as_tensor(log_conditions)
    cumulative = own.flip(0).cumsum(0).flip(0)
    spread = (cumulative.max() - cumulative.min()).clamp_min(torch.finfo(own.dtype).tiny)
    return largest - (cumulative.max() - cumulative) / spread * (largest - least)


def head_groups(moments: torch.Tensor, heads: int) -> list[list[int]]:
    """Heads in groups of at most `GROUP_HEADS`, similar ones together.

    moments: [H*D, H*D] of rows. The first free head takes the most similar free ones.
    """
    blocks = moments.reshape(heads, -1, heads, moments.shape[-1] // heads)
    products = blocks.square().sum(dim=(1, 3))
    own = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
    similarity = products / (own[:, None] * own)
    free = list(range(heads))
    groups = []
    while free:
        first = free[0]
        nearest = sorted(free[1:], key=lambda head: (-float(similarity[first, head]), head))
        group = [first, *nearest[: GROUP_HEADS - 1]]
        groups.append(group)
        free = [head for head in free if head not in group]
    return groups


def _grouped_basis(moments: torch.Tensor, heads: int, share: float) -> torch.Tensor:
    """Columns [H*D, rank] of one layer, each within one group of heads."""
    width = moments.shape[-1]
    size = width // heads
    columns = []
    for group in head_groups(moments, heads):
        rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in group])
        basis = leading(moments[rows][:, rows], max(1, round(share * len(rows))))
        column = torch.zeros(width, basis.shape[1])
        column[rows] = basis
        columns.append(column)
    return torch.cat(columns, dim=1)
