"""Joint Encoding: blocks with alike keys share a direction and keep their own norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import (
    from_bytes,
    pack_positions,
    sixteen_bit,
    to_cache,
    to_sixteen_bit,
    unpack_positions,
)

BLOCK_TOKENS = 16
LEAF_BLOCKS = 8
EXACT_LAYERS = 2
"""At either end of the model."""

Alike = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(cosines [l, r], norms [l], norms [r]) -> bool [l, r]: which pairs may be one."""


class Fused(NamedTuple):
    """Directions that blocks share.

    keys: float32 [m, d], of norm 1. values: float32 [m, dv]. of_block: int64 [n], for each block
    which.
    """

    keys: torch.Tensor
    values: torch.Tensor
    of_block: torch.Tensor


class _Leaf(NamedTuple):
    """What is left of some blocks. norms: of each direction's first block."""

    keys: torch.Tensor
    values: torch.Tensor
    norms: torch.Tensor
    members: list[list[int]]


def fuse(keys: torch.Tensor, values: torch.Tensor, leaves: Sequence[int], alike: Alike) -> Fused:
    """Fuse the blocks of different leaves, as the released code does.

    keys: float32 [n, d], values: float32 [n, dv], a row per block. leaves: blocks of each leaf,
    which are not compared with each other: a run of a prompt (its chunk form) or a request (its
    batch form). Halves are solved and then merged. A left direction becomes the mean of itself
    and of all right ones that are alike, its keys scaled to norm 1 again; a right one that is
    like several goes with the last. Values follow the keys and are not compared.
    """
    norms = keys.norm(dim=1)
    unit_keys, unit_values = _unit(keys), _unit(values)
    parts, first = [], 0
    for count in leaves:
        rows = slice(first, first + count)
        members = [[n] for n in range(first, first + count)]
        parts.append(_Leaf(unit_keys[rows], unit_values[rows], norms[rows], members))
        first += count
    whole = _solve(parts, alike)
    of_block = torch.empty(len(keys), dtype=torch.int64)
    for direction, blocks in enumerate(whole.members):
        of_block[torch.tensor(blocks)] = direction
    return Fused(whole.keys, whole.values, of_block)


def _solve(parts: Sequence[_Leaf], alike: Alike) -> _Leaf:
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _merge(_solve(parts[:half], alike), _solve(parts[half:], alike), alike)


def _merge(left: _Leaf, right: _Leaf, alike: Alike) -> _Leaf:
    pairs = alike(left.keys @ right.keys.T, left.norms, right.norms)
    weights = pairs.float()
    fused = pairs.any(dim=1)
    keys, values = left.keys.clone(), left.values.clone()
    keys[fused] = _unit((left.keys + weights @ right.keys)[fused])
    counts = 1 + weights.sum(dim=1, keepdim=True)
    values[fused] = ((left.values + weights @ right.values) / counts)[fused]
    members = [list(own) for own in left.members]
    for number, own in enumerate(right.members):
        takers = pairs[:, number].nonzero()
        if len(takers):
            members[int(takers[-1])] += own
    alone = ~pairs.any(dim=0)
    members += [
        own for own, is_alone in zip(right.members, alone.tolist(), strict=True) if is_alone
    ]
    return _Leaf(
        torch.cat((keys, right.keys[alone])),
        torch.cat((values, right.values[alone])),
        torch.cat((left.norms, right.norms[alone])),
        members,
    )


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to norm 1; rows of zeros stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


class JointFusion(Baseline):
    """Joint Encoding (arXiv 2601.03067) as its released code does it, in its chunk form.

    Followed: blocks of 16 tokens, each layer by itself, keys post-RoPE flattened and normalised,
    a cosine above 0.75, a tree of merges over runs of the prompt, values fused with the keys'
    index, each block's own norms of K and V. The first and last two layers are kept as they are.
    Charged: directions and exact layers with 16 bits per element, norms in float32, an index of
    as few bits as do, the partial last block. The paper's ratio counts whole blocks of the fused
    layers only.
    Departures: leaves of 128 tokens, not 512, so that prompts of a thousand tokens have a tree.
    All runs are compared at once, not those of the last chunks only. A prefix of the bench is one
    request, so the batch form is `fuse` with a leaf per request, and no row of its table.
    """

    name = "joint-fusion"
    source = "Joint Encoding, arXiv 2601.03067: cosine of keys above 0.75, chunk form"
    whole_prompt = True

    @staticmethod
    def alike(cosines: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return cosines > 0.75

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        blocks = len(k) // BLOCK_TOKENS
        whole = blocks * BLOCK_TOKENS
        parts: list[bytes] = []
        for layer in range(self.geometry.num_layers):
            keys, values = k[:, layer].float(), v[:, layer].float()
            if not self._is_fused(layer, blocks):
                parts += [self._exact(keys), self._exact(values)]
                continue
            rows = keys[:whole].reshape(blocks, -1), values[:whole].reshape(blocks, -1)
            full, rest = divmod(blocks, LEAF_BLOCKS)
            fused = fuse(*rows, [LEAF_BLOCKS] * full + [rest] * (rest > 0), self.alike)
            parts += [
                len(fused.keys).to_bytes(4, "little"),
                pack_positions(fused.of_block, blocks),
                self._exact(fused.keys),
                self._exact(fused.values),
                *(to_bytes(x.norm(dim=1)) for x in rows),
                self._exact(keys[whole:]),
                self._exact(values[whole:]),
            ]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        blocks = tokens // BLOCK_TOKENS
        rest = tokens - blocks * BLOCK_TOKENS
        shapes = [(g.num_kv_heads, size) for size in (g.head_size, g.head_size_v)]
        views = iter(parts)
        layers: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for layer in range(g.num_layers):
            if not self._is_fused(layer, blocks):
                for found, shape in zip(layers, shapes, strict=True):
                    found.append(self._read(next(views), (tokens, *shape)))
                continue
            count = int.from_bytes(next(views), "little")
            index = unpack_positions(next(views), blocks, (blocks,))
            widths = [BLOCK_TOKENS * heads * size for heads, size in shapes]
            directions = [self._read(next(views), (count, width)) for width in widths]
            norms = [from_bytes(next(views), torch.float32, (blocks, 1)) for _ in shapes]
            for found, shape, shared, own in zip(layers, shapes, directions, norms, strict=True):
                rows = (shared[index] * own).view(-1, *shape)
                found.append(torch.cat((rows, self._read(next(views), (rest, *shape)))))
        keys, values = (to_cache(torch.stack(found, dim=1), self.dtype) for found in layers)
        return keys, values

    def _is_fused(self, layer: int, blocks: int) -> bool:
        return blocks > 1 and EXACT_LAYERS <= layer < self.geometry.num_layers - EXACT_LAYERS

    def _exact(self, x: torch.Tensor) -> bytes:
        return to_bytes(to_sixteen_bit(x, self.dtype))

    def _read(self, view: memoryview, shape: Sequence[int]) -> torch.Tensor:
        return from_bytes(view, sixteen_bit(self.dtype), shape).float()


class JointFusionStrict(JointFusion):
    """The same with the limit that its authors' later branches call safe.

    Followed: a cosine above 0.8, and an error of the keys of at most 0.3 if one block stood for
    the other unscaled: sqrt(1 + r^2 - 2 r cos) with r the ratio of their norms.
    """

    name = "joint-fusion-strict"
    source = "Joint Encoding, its authors' later branches: cosine above 0.8, error at most 0.3"

    @staticmethod
    def alike(cosines: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ratio = right[None, :] / left[:, None].clamp_min(torch.finfo(left.dtype).tiny)
        error = (1 + ratio.square() - 2 * ratio * cosines).clamp_min(0).sqrt()
        return (cosines > 0.8) & (error <= 0.3)
