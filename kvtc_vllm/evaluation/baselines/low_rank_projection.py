"""LoRC and ReCalKV: a layer's rows projected on a few directions that are fixed per model."""

from __future__ import annotations

import itertools
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

    Followed: key heads are reordered so that similar ones (by centred kernel alignment, the most
    alike first) share a group of four, each group has one decomposition; values of a layer have
    one of all heads, calibrated on data. Keys before RoPE.
    Ranks of all layers, keys and values together, are in proportion to the Fisher information of
    their projections, none above its width, as the authors' code has it (`fisher_uniform` in
    palu/rank_search.py of github.com/XIANGLONGYAN/ReCalKV); groups of one projection get equal
    shares.
    Departures: decompositions are of the second moments of calibration rows, for keys as well,
    where the paper decomposes weights that such moments whiten: the best approximation of the
    same data by that rank, so there is nothing left for the paper's refinement of values. The
    authors round ranks to multiples of 32, here they are exact. Similarity is that of rows, which
    is that of the authors' whitened weights but for their means.
    """

    name = "recalkv"
    source = (
        "ReCalKV, arXiv 2505.24357: grouped heads for keys, calibrated values, half of the rank"
    )
    settings: ClassVar[Settings] = {"share": Setting(0.5, 0.01, 1)}

    def bases(self, kind: Kind) -> list[torch.Tensor]:
        known, layers = self.statistics, self.geometry.num_layers
        widths = [
            rows.shape[-1] for rows in (known.key_rows, known.value_rows) for _ in range(layers)
        ]
        information = torch.cat((known.key_fisher, known.value_fisher)).tolist()
        ranks = fisher_ranks(information, widths, self.values["share"])
        if kind == "v":
            pairs = zip(known.value_rows, ranks[layers:], strict=True)
            return [leading(moments, rank) for moments, rank in pairs]
        return [
            _grouped_basis(moments, self.geometry.num_kv_heads, rank)
            for moments, rank in zip(known.key_rows, ranks[:layers], strict=True)
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


def fisher_ranks(information: Sequence[float], widths: Sequence[int], share: float) -> list[int]:
    """Ranks in proportion to information, whose sum is a share of all widths.

    None is above its width or below 1. What that and rounding leave goes one by one, in turns,
    first to those that are furthest below their proportion.
    """
    total = round(share * sum(widths))
    scale = total / max(sum(information), torch.finfo(torch.float64).tiny)
    wanted = [scale * own for own in information]
    ranks = [max(1, min(int(own), width)) for own, width in zip(wanted, widths, strict=True)]
    order = sorted(range(len(ranks)), key=lambda n: (ranks[n] - wanted[n], n))
    left = total - sum(ranks)
    while left > 0:
        for number in order:
            if left > 0 and ranks[number] < widths[number]:
                ranks[number] += 1
                left -= 1
    return ranks


def head_groups(moments: torch.Tensor, heads: int) -> list[list[int]]:
    """Heads in as few groups of at most `GROUP_HEADS` as hold them, similar ones together.

    moments: [H*D, H*D] of rows. Pairs are gone through from the most similar on: two free heads
    open a group or join one with room for both, a free one joins the other's. What is left fills
    the groups.
    """
    blocks = moments.reshape(heads, -1, heads, moments.shape[-1] // heads)
    products = blocks.square().sum(dim=(1, 3))
    own = products.diagonal().clamp_min(torch.finfo(products.dtype).tiny).sqrt()
    similarity = (products / (own[:, None] * own)).tolist()
    groups: list[list[int]] = [[] for _ in range(-(-heads // GROUP_HEADS))]
    home: dict[int, list[int]] = {}
    pairs = sorted(
        itertools.combinations(range(heads), 2), key=lambda p: (-similarity[p[0]][p[1]], p)
    )
    for pair in pairs:
        free = [head for head in pair if head not in home]
        known = [home[head] for head in pair if head in home]
        for group in known if len(free) == 1 else groups:
            if free and len(group) + len(free) <= GROUP_HEADS:
                group.extend(free)
                home |= dict.fromkeys(free, group)
                break
    for head in range(heads):
        if head not in home:
            group = next(group for group in groups if len(group) < GROUP_HEADS)
            group.append(head)
    return groups


def _grouped_basis(moments: torch.Tensor, heads: int, rank: int) -> torch.Tensor:
    """Columns [H*D, rank] of one layer, each within one group of heads."""
    width = moments.shape[-1]
    size = width // heads
    columns: list[torch.Tensor] = []
    done = 0
    for group in head_groups(moments, heads):
        rows = torch.cat([torch.arange(head * size, (head + 1) * size) for head in group])
        done += len(rows)
        # Shares by width whose sum is the rank.
        own = round(rank * done / width) - sum(column.shape[1] for column in columns)
        basis = leading(moments[rows][:, rows], own)
        column = torch.zeros(width, basis.shape[1])
        column[rows] = basis
        columns.append(column)
    return torch.cat(columns, dim=1)
