"""xKV: one singular value decomposition per prompt and group of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.codec.transform import keys_from_rows, rows_from_keys
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import from_bytes, low_rank, to_cache
from kvtc_vllm.evaluation.settings import Setting, Settings

GROUP_LAYERS = 4


class Xkv(Baseline):
    """xKV (arXiv 2503.18893) with the settings of the KVTC paper and of xKV's own Llama-8B run.

    Followed: the rows of 4 consecutive layers side by side, [T, 4 * H * D], are
    replaced by their best approximation of lower rank, computed from the prompt itself.
    Keys pre-RoPE, as in xKV's code (given `ropes`; without them, as they are).
    Not centred. Ranks 512 for keys and 768 for values at a width of 4096, which its code calls 6x
    (examples/lm_eval_gsm8k.sh of github.com/abdelfattah-lab/xKV; its 8x has 384 and 576); here
    1/8 and 3/16 of the width of the model at hand (settings `keys` and `values`). A last group of
    fewer layers gets the same shares.
    Charged: both factors in float16, [T, r] and [r, 4 * H * D]: the basis travels with
    the prompt, so short prompts gain little or lose.
    Departures: xKV's code keeps the product of float32 factors and stores nothing;
    float16 factors are what storing them takes. Prompts only: xKV leaves generated
    tokens alone, the bench has none in its prefixes.
    """

    name = "xkv"
    source = "xKV, arXiv 2503.18893: groups of 4 layers, ranks 1/8 (keys) and 3/16 (values)"
    whole_prompt = True
    settings: ClassVar[Settings] = {
        "keys": Setting(512 / 4096, 0.001, 1),
        "values": Setting(768 / 4096, 0.001, 1),
    }

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        positions = torch.arange(start, start + len(k))
        parts: list[bytes] = []
        for first, end in self._layer_groups():
            keys = rows_from_keys(k[:, first:end], self.ropes[first:end], positions)
            values = v[:, first:end].float().flatten(1)
            for rows, share in ((keys, self.values["keys"]), (values, self.values["values"])):
                left, right = low_rank(rows, rank_of(len(rows), rows.shape[1], share))
                parts += [to_bytes(left), to_bytes(right)]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        positions = torch.arange(start, start + tokens)
        keys, values = [], []
        views = iter(parts)
        for first, end in self._layer_groups():
            heads = (end - first) * g.num_kv_heads
            rows = _product(
                next(views), next(views), tokens, heads * g.head_size, self.values["keys"]
            )
            keys.append(keys_from_rows(rows, self.ropes[first:end], positions, g.num_kv_heads))
            rows = _product(
                next(views), next(views), tokens, heads * g.head_size_v, self.values["values"]
            )
            values.append(rows.view(tokens, end - first, g.num_kv_heads, g.head_size_v))
        return (
            to_cache(torch.cat(keys, dim=1), self.dtype),
            to_cache(torch.cat(values, dim=1), self.dtype),
        )

    def _layer_groups(self) -> Iterator[tuple[int, int]]:
        """Half-open ranges of layers that share a basis."""
        layers = self.geometry.num_layers
        for first in range(0, layers, GROUP_LAYERS):
            yield first, min(first + GROUP_LAYERS, layers)


def rank_of(tokens: int, width: int, share: float) -> int:
    """Rank of a section: never more than its rows have."""
    return min(max(round(share * width), 1), tokens)


def _product(
    left: memoryview, right: memoryview, tokens: int, width: int, share: float
) -> torch.Tensor:
    """Rows float32 [tokens, width] from the stored factors."""
    rank = rank_of(tokens, width, share)
    factors = (
        from_bytes(left, torch.float16, (tokens, rank)).float(),
        from_bytes(right, torch.float16, (rank, width)).float(),
    )
    return factors[0] @ factors[1]
