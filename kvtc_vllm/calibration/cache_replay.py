"""What a codec does to a model's predictions: a prefix through blobs, KL over what follows.

A model in transformers computes the prefix of a document. Its K and V go through a codec, chunk by
chunk, and back. The next tokens are computed exactly on what came back, as the recent window is in
serving; over those after them, predictions are compared with those on the uncompressed cache.
transformers is imported when called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtc_vllm.codec.base import Coder, DecodedChunk

RESAMPLES = 10_000


@dataclass(frozen=True)
class Prefix:
    """A document on its uncompressed cache, which is rounded to the cache's type as in serving.

    name: for people. ids: its tokens. k, v: K post-RoPE and V of the prefix [T, L, H, D], the
    cache's type. scored: how many of the last tokens are compared. exact: log-probabilities of
    what follows each of them, float32 [scored, V].
    """

    name: str
    ids: Sequence[int]
    k: torch.Tensor
    v: torch.Tensor
    scored: int
    exact: torch.Tensor


@torch.no_grad()
def compute_prefix(
    model: Any,
    name: str,
    ids: Sequence[int],
    prefix: int,
    scored: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Prefix:
    """Run a document. model: of transformers, which may lie on a GPU; tensors come to the CPU."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    tokens = torch.tensor([list(ids[:prefix])], device=model.device)
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    k, v = (
        torch.stack([getattr(layer, which)[0].transpose(0, 1) for layer in cache.layers], dim=1)
        .to(dtype)
        .cpu()
        for which in ("keys", "values")
    )
    return Prefix(name, ids, k, v, scored, score(model, ids, k, v, scored))


@torch.no_grad()
def score(
    model: Any, ids: Sequence[int], k: torch.Tensor, v: torch.Tensor, scored: int
) -> torch.Tensor:
    """Log-probabilities after each of the last `scored` tokens, float32 [S, V], on a prefix cache.

    k, v: of the first tokens, [T, L, H, D].
    """
    from transformers import DynamicCache

    # Without the model's configuration every layer keeps all tokens, also one with a window.
    cache: Any = DynamicCache()
    for layer in range(k.shape[1]):
        keys, values = (
            x[:, layer].transpose(0, 1)[None].to(model.device, model.dtype) for x in (k, v)
        )
        cache.update(keys.contiguous(), values.contiguous(), layer)
    rest = torch.tensor([list(ids[len(k) :])], device=model.device)
    output = model(input_ids=rest, past_key_values=cache, logits_to_keep=scored)
    return torch.log_softmax(output.logits[0].float(), dim=-1).cpu()


def round_trip(
    codec: Coder, k: torch.Tensor, v: torch.Tensor, chunk: int
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Bytes of all blobs, of `chunk` tokens each, and the K and V that they hold.

    k, v: [T, L, H, D] from position 0 on. Raises CodecError for what is not stored.
    """
    taken = 0
    chunks: list[DecodedChunk] = []
    for start in range(0, len(k), chunk):
        part = slice(start, start + chunk)
        blob = codec.encode(k[part], v[part], start)
        taken += len(blob)
        chunks.append(codec.decode(blob, start, len(k[part])))
    return taken, torch.cat([c.k for c in chunks]), torch.cat([c.v for c in chunks])


def kl(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Mean divergence in nats per token. Both: log-probabilities, float32 [S, V]."""
    return float((exact.exp() * (exact - found)).sum(-1).double().mean())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean, 95 %: percentiles of resampled documents."""
    observed = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = observed[drawn].mean(dim=1).sort().values
    return float(means[math.floor(0.025 * RESAMPLES)]), float(means[math.ceil(0.975 * RESAMPLES)])
