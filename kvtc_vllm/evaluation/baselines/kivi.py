"""KIVI: keys per channel and values per token, in 2 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from kvtc_vllm.codec.quantizers.uniform import INT2, INT4, UniformQuantizer
from kvtc_vllm.codec.shuffle import to_bytes
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.formats import (
    PARTS,
    dequantize_groups,
    from_bytes,
    quantize_groups,
    to_cache,
)
from kvtc_vllm.evaluation.settings import Setting, Settings

GROUP = 32


class Kivi(Baseline):
    """KIVI-2 (arXiv 2402.02750) with the settings of the KVTC paper: 2 bits, groups of 32
    (setting `group`).

    Followed: post-RoPE keys are quantised per channel, 32 consecutive tokens per group;
    values per token, 32 channels of one head per group; asymmetric between the group's
    minimum and maximum. KIVI's residual of the newest 128 tokens in full precision is
    not kept here: the replay recomputes the newest 128 tokens exactly for every method.
    Charged: 2 bits per element, a float16 zero point and scale per group (3 bits per
    element in all, 5.3x), and the last T mod 32 tokens' keys in the cache dtype.
    Departures: zero point and scale are rounded to float16 before the codes are
    computed, not after, so that rounding adds no error of its own; they are float16
    for bf16 caches too. Both favour KIVI.
    """

    name = "kivi-2bit"
    source = "KIVI, arXiv 2402.02750: 2 bits, group 32, residual 128 (the replay's window)"
    quantizer: ClassVar[UniformQuantizer] = INT2
    settings: ClassVar[Settings] = {"group": Setting(GROUP, 8, 256, whole=True)}

    def prepare(self) -> None:
        self._group = int(self.values["group"])
        if self.geometry.head_size_v % self._group:
            raise ValueError(
                f"a value head of {self.geometry.head_size_v} elements is no whole groups of "
                f"{self._group}"
            )

    def compress(self, k: torch.Tensor, v: torch.Tensor, start: int) -> list[bytes]:
        group = self._group
        whole = len(k) // group
        keys = k[: whole * group].float().reshape(whole, group, *k.shape[1:]).movedim(1, -1)
        values = v.float().unflatten(-1, (-1, group))
        tail = to_bytes(k[whole * group :])
        return [
            *quantize_groups(keys, self.quantizer),
            tail,
            *quantize_groups(values, self.quantizer),
        ]

    def restore(
        self, parts: Sequence[memoryview], tokens: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        g, group = self.geometry, self._group
        layer = (g.num_layers, g.num_kv_heads)
        whole, rest = divmod(tokens, group)
        keys = dequantize_groups(parts[:PARTS], (whole, *layer, g.head_size, group), self.quantizer)
        tail = from_bytes(parts[PARTS], self.dtype, (rest, *layer, g.head_size))
        values = dequantize_groups(
            parts[PARTS + 1 :], (tokens, *layer, g.head_size_v // group, group), self.quantizer
        )
        k = to_cache(keys.movedim(-1, 1).flatten(0, 1), self.dtype)
        return torch.cat((k, tail)), to_cache(values.flatten(-2), self.dtype)


class Kivi4(Kivi):
    """KIVI-4, the paper's other width: as `Kivi`, with 4 bits per element (5 in all, 3.2x)."""

    name = "kivi-4bit"
    source = "KIVI, arXiv 2402.02750: 4 bits, group 32, residual 128 (the replay's window)"
    quantizer = INT4
