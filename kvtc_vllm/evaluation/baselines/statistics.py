"""What some baselines know of a model: moments of its attention, Gram matrices of weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from kvtc_vllm.codec.artifact import Geometry


@dataclass(frozen=True)
class ModelStatistics:
    """Per layer; sums over calibration tokens, or of weights. float64, on the CPU.

    queries: [L, H, D, D], of queries with RoPE, summed over the query heads of a KV head.
    keys: [L, H, D, D], of keys with RoPE. values: [L, H, Dv, Dv].
    key_rows: [L, H*D, H*D], of keys before RoPE, all heads side by side.
    value_rows: [L, H*Dv, H*Dv].
    key_weights, value_weights: W W^T of the projections, [L, H*D, H*D] and [L, H*Dv, H*Dv].
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    key_rows: torch.Tensor
    value_rows: torch.Tensor
    key_weights: torch.Tensor
    value_weights: torch.Tensor

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises OSError or SafetensorError for what is no such file."""
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        """Write all as safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in self._tensors().items()}, path)

    def check(self, geometry: Geometry) -> None:
        """Raises ValueError if they are of a model of another shape."""
        layers, heads = geometry.num_layers, geometry.num_kv_heads
        for kind, size in (("key", geometry.head_size), ("value", geometry.head_size_v)):
            width = heads * size
            wanted = {
                f"{kind}s": (layers, heads, size, size),
                f"{kind}_rows": (layers, width, width),
                f"{kind}_weights": (layers, width, width),
            }
            for name, shape in wanted.items():
                found = tuple(getattr(self, name).shape)
                if found != shape:
                    raise ValueError(f"statistics: {name} has shape {found}, the cache {shape}")

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class StatisticsTally:
    """Sums second moments of one attention layer after another.

    layers: number of layers, in whose order they must be added.
    """

    def __init__(self, layers: int) -> None:
        self._sums: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]

    def add(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        plain_keys: torch.Tensor,
    ) -> None:
        """Of one prompt: queries [Hq, T, D], keys [H, T, D], values [H, T, Dv] and keys before
        RoPE [H, T, D]. Query heads of one KV head lie side by side."""
        heads, tokens, size = keys.shape
        grouped = queries.reshape(heads, -1, tokens, size).flatten(1, 2)
        for name, x in (
            ("queries", grouped),
            ("keys", keys),
            ("values", values),
            ("key_rows", _side_by_side(plain_keys)),
            ("value_rows", _side_by_side(values)),
        ):
            moments = x.double().mT @ x.double()
            sums = self._sums[layer]
            sums[name] = sums[name] + moments if name in sums else moments

    def result(self, key_weights: list[Any], value_weights: list[Any]) -> ModelStatistics:
        """The statistics; weights: projections [H*D, hidden] of each layer."""
        grams = {
            "key_weights": torch.stack([w.double() @ w.double().T for w in key_weights]),
            "value_weights": torch.stack([w.double() @ w.double().T for w in value_weights]),
        }
        moments = {name: torch.stack([sums[name] for sums in self._sums]) for name in self._sums[0]}
        return ModelStatistics(**moments, **grams)


def leading(moments: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors [..., n, rank] of the largest eigenvalues of [..., n, n], largest first."""
    vectors: torch.Tensor = torch.linalg.eigh(moments.double()).eigenvectors
    return vectors.flip(-1)[..., :rank].float()


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """[H, T, D] -> [T, H*D]."""
    return x.movedim(0, 1).flatten(1)
