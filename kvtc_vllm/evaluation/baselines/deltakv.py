"""DeltaKV without its trained parts: tokens as residuals to the earlier ones most like them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.codec.transform import keys_from_rows, rows_from_keys
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import (
    PARTS,
    dequantize_groups,
    from_bytes,
    pack_positions,
    quantize_groups,
    sixteen_bit,
    to_cache,
    unpack_positions,
)
from kvtc_vllm.evaluation.settings import Setting, Settings

GROUP = 32


class DeltaKV(Baseline):
    """DeltaKV (arXiv 2602.08005), training-free form.

    Followed: in each layer every tenth token (setting `stride`) is kept whole, as a reference.
    Another token is predicted by the mean of the four references (setting `references`, the
    paper's top-k) before it whose rows of K and V are nearest to
    its own, and only the residual is coded. Keys before RoPE (given `ropes`), so that distant
    tokens can be alike.
    Charged: references and sinks in 16 bits, the number of each token's references per layer,
    2-bit codes of residuals with a float16 zero point and scale per 32 elements of a head.
    The authors' code (github.com/CURRENTF/Sparse-vLLM) chooses the same way: fixed stride, squared
    distance of K before RoPE and V side by side, the mean of what was chosen.
    Departures: the paper codes residuals by a small network that is trained on each model (public
    ones are of Qwen2.5-7B and 32B and Llama-3.1-8B), here they are quantised as KIVI quantises
    values; so this says what retrieval is worth, not what that network is. Residuals are taken to
    references as stored. The authors keep the first 8 tokens whole (setting `sinks`, none unless it
    is given) and some layers (five or six of 28), which costs bytes, and read only some tokens when
    they decode; here all layers are coded and all tokens read.
    """

    name = "deltakv"
    source = "DeltaKV, arXiv 2602.08005, training-free: stride 10, 4 references, 2-bit residuals"
    whole_prompt = True
    settings: ClassVar[Settings] = {
        "stride": Setting(10, 2, 1024, whole=True),
        "references": Setting(4, 1, 64, whole=True),
        "sinks": Setting(0, 0, 1024, whole=True),
    }

    def prepare(self) -> None:
        self._stride, self._references, self._sinks = (int(x) for x in self.values.values())
        for size in (self.geometry.head_size, self.geometry.head_size_v):
            if size % GROUP:
                raise ValueError(f"a head of {size} elements is no whole groups of {GROUP}")

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        positions = torch.arange(start, start + len(k))
        parts: list[bytes] = []
        for layer in range(self.geometry.num_layers):
            keys = rows_from_keys(k[:, layer : layer + 1], self.ropes[layer : layer + 1], positions)
            rows = torch.cat((keys, v[:, layer].float().flatten(1)), dim=1)
            whole, others = self._whole(len(rows))
            stored = to_cache(rows[whole], sixteen_bit(self.dtype))
            references = self._of_references(stored.float(), whole)
            chosen = self._nearest(rows[others], references, others)
            residuals = rows[others] - _predictions(references, chosen)
            parts += [
                to_bytes(stored),
                pack_positions(chosen, _numbers(len(references))),
                *quantize_groups(residuals.unflatten(1, (-1, GROUP))),
            ]
        return parts

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g = self.geometry
        positions = torch.arange(start, start + tokens)
        width_k = g.num_kv_heads * g.head_size
        width = width_k + g.num_kv_heads * g.head_size_v
        whole, others = self._whole(tokens)
        count = -(-tokens // self._stride)
        keys, values = [], []
        for layer in range(g.num_layers):
            own = parts[layer * (PARTS + 2) : (layer + 1) * (PARTS + 2)]
            stored = from_bytes(own[0], sixteen_bit(self.dtype), (len(whole), width)).float()
            references = self._of_references(stored, whole)
            chosen = unpack_positions(own[1], _numbers(count), (len(others), self._references))
            residuals = dequantize_groups(own[2:], (len(others), width // GROUP, GROUP))
            rows = torch.empty(tokens, width)
            rows[whole] = stored
            rows[others] = residuals.flatten(1) + _predictions(references, chosen)
            ropes = self.ropes[layer : layer + 1]
            keys.append(
                keys_from_rows(rows[:, :width_k].contiguous(), ropes, positions, g.num_kv_heads)
            )
            values.append(rows[:, width_k:].reshape(tokens, 1, g.num_kv_heads, g.head_size_v))
        return (
            to_cache(torch.cat(keys, dim=1), self.dtype),
            to_cache(torch.cat(values, dim=1), self.dtype),
        )

    def _whole(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that are kept whole, references and sinks, and the others; both rising."""
        numbers = torch.arange(tokens)
        whole = (numbers % self._stride == 0) | (numbers < self._sinks)
        return numbers[whole], numbers[~whole]

    def _of_references(self, rows: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Those of the references among rows of the tokens `whole`."""
        return rows[whole % self._stride == 0]

    def _nearest(
        self, rows: torch.Tensor, references: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return nearest_references(rows, references, tokens, self._stride, self._references)


def nearest_references(
    rows: torch.Tensor, references: torch.Tensor, tokens: torch.Tensor, stride: int, count: int
) -> torch.Tensor:
    """Numbers of the `count` nearest earlier references: int64 [n, count].

    rows: [n, width] of the tokens at `tokens`. references: every `stride`th token. A token with
    fewer earlier references repeats its nearest one, which `_predictions` counts once.
    """
    distances = torch.cdist(rows, references)
    later = torch.arange(len(references)) * stride > tokens[:, None]
    distances = distances.masked_fill(later, torch.inf)
    order = distances.argsort(dim=1, stable=True)[:, :count]
    if order.shape[1] < count:
        order = torch.cat((order, order[:, :1].expand(-1, count - order.shape[1])), dim=1)
    return torch.where(order * stride <= tokens[:, None], order, order[:, :1])


def _predictions(references: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of the references that were chosen, each once: [n, width]."""
    repeats = chosen[:, 1:] == chosen[:, :1]
    weights = torch.cat((torch.ones(len(chosen), 1), (~repeats).float()), dim=1)
    total = torch.einsum("nr,nrw->nw", weights, references[chosen])
    return total / weights.sum(dim=1, keepdim=True)


def _numbers(references: int) -> int:
    """Numbers of references are below this: at least 2, as one bit is the least."""
    return max(2, references)
