"""A model in transformers whose cache of a prefix can be differentiated.

The prefix of a document is computed without gradients. Its K and V are then the leaves of a graph
that computes the continuation. The label of every place is drawn from the model's own prediction
there, so that the mean squared gradient is the diagonal of a Fisher matrix: to second order, what
an error in the cache costs in KL divergence. Keys are differentiated with RoPE applied, which
rotates a gradient and leaves its norm. transformers is imported when called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.calibration.in_transformers import Asked, load_model
from kvtc_vllm.offload.reach import FULL, Reach


@dataclass(frozen=True)
class CacheShape:
    """A cache group that gradients must be of.

    layers, KV heads of all ranks, head sizes of K and V. numbers: of the layers in the model;
    none: from 0 on. reach: the tokens that its attention sees.
    """

    layers: int
    kv_heads: int
    head_size: int
    head_size_v: int
    numbers: tuple[int, ...] = ()
    reach: Reach = FULL

    @property
    def places(self) -> Sequence[int]:
        """Of its layers among the model's."""
        return self.numbers or range(self.layers)

    def leaves(self, prefix: int) -> list[tuple[int, ...]]:
        """Shapes of a layer's K and V in transformers."""
        return [(1, self.kv_heads, prefix, size) for size in (self.head_size, self.head_size_v)]


@dataclass(frozen=True)
class PrefixGradients:
    """Gradients of a continuation with respect to the cache of its prefix, and that V.

    keys, values: per layer [H, T, D] and [H, T, Dv], the model's dtype; keys with RoPE applied.
    cached_values: [T, L, H, Dv].
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    cached_values: torch.Tensor

    def energies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared, summed over elements: float64 [L, H, T] for K and for V, on the CPU."""
        k, v = (
            torch.stack([g.double().square().sum(dim=-1).cpu() for g in of_kind])
            for of_kind in (self.keys, self.values)
        )
        return k, v


GRADIENTS = Asked("--sensitivity gradient", "give --sensitivity probe or none")


class Differentiable:
    """A model in transformers whose prefix cache can be differentiated.

    tokenizer: the model's. max_positions: longest prompt that its configuration allows.
    directory: of the model. device: as torch names it; on a CPU arithmetic is float32, on a GPU
    the checkpoint's dtype. Raises ArtifactError if transformers cannot load it.
    """

    def __init__(self, directory: Path, device: str, *, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self._device = torch.device(device)
        loaded = load_model(directory, device, GRADIENTS, trust_remote_code=trust_remote_code)
        self._model, self.tokenizer = loaded.model, loaded.tokenizer
        self.max_positions = loaded.max_positions

    def gradients(
        self,
        ids: Sequence[int],
        prefix: int,
        shapes: Sequence[CacheShape],
        generator: torch.Generator,
    ) -> list[PrefixGradients]:
        """Differentiate the likelihood of labels drawn after each token of the continuation.

        ids: of prefix and continuation. shapes: of all cache groups; what is returned is theirs,
        in order. generator: draws the labels, on the CPU. Raises ArtifactError if the model does
        not run, or its cache is not of these shapes.
        """
        try:
            leaves, gradients = self._gradients(ids, prefix, generator)
        except Exception as error:
            raise GRADIENTS.unusable(self.directory, error) from error
        wanted = {layer: shape.leaves(prefix) for shape in shapes for layer in shape.places}
        found = [tuple(leaf.shape) for leaf in leaves]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        order = sorted(wanted)
        if len(pairs) != len(order) or any(
            sorted(pair) != sorted(wanted[layer]) for pair, layer in zip(pairs, order, strict=False)
        ):
            captured = ", ".join(
                f"{shape.layers} of {shape.leaves(prefix)[0]} and {shape.leaves(prefix)[1]}"
                for shape in shapes
            )
            first = f", the first of K {found[0]} and V {found[1]}" if found else ""
            raise GRADIENTS.unusable(
                self.directory,
                f"its cache has {len(pairs)} layers of attention{first}; captured were {captured}",
            )
        # transformers calls a latent K and its rotated key V, which are our V and K.
        places = {
            layer: (2 * i, 2 * i + 1) if list(pair) == wanted[layer] else (2 * i + 1, 2 * i)
            for i, (pair, layer) in enumerate(zip(pairs, order, strict=True))
        }
        return [
            _of_layers(leaves, gradients, [places[layer] for layer in shape.places])
            for shape in shapes
        ]

    def _gradients(
        self, ids: Sequence[int], prefix: int, generator: torch.Generator
    ) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
        tokens = torch.tensor([list(ids)], device=self._device)
        cache = _empty_cache(self._model)
        with torch.no_grad():
            self._model(
                input_ids=tokens[:, :prefix],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        leaves: list[torch.Tensor] = []
        for layer in cache.layers:
            if hasattr(layer, "recurrent_states"):
                _keep_states(layer)
            if getattr(layer, "keys", None) is not None:
                layer.keys, layer.values = pair = [
                    x.detach().clone().requires_grad_() for x in (layer.keys, layer.values)
                ]
                leaves += pair
        output = self._model(input_ids=tokens[:, prefix:], past_key_values=cache)
        likelihood = torch.log_softmax(output.logits[0].float(), dim=-1)
        chances = likelihood.detach().exp().cpu()
        labels = torch.multinomial(chances, 1, generator=generator).to(self._device)
        return leaves, torch.autograd.grad(likelihood.gather(1, labels).sum(), leaves)


def _empty_cache(model: Any) -> Any:
    """Every layer of attention keeps all tokens, also one with a window; recurrent ones a state."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache: Any = DynamicCache(config=model.config)
    if not any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        return DynamicCache()
    cache.layers = [
        layer if hasattr(layer, "recurrent_states") else DynamicLayer() for layer in cache.layers
    ]
    return cache


def _keep_states(layer: Any) -> None:
    """Have a recurrent layer go on from its states without writing the new ones over them, which
    their gradients need."""

    def conv(new: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        return torch.cat([layer.conv_states[state_idx], new], dim=-1)

    def recurrent(new: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        return new

    layer.update_conv_state, layer.update_recurrent_state = conv, recurrent


def _of_layers(
    leaves: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    places: Sequence[tuple[int, int]],
) -> PrefixGradients:
    """places: where K and V of each layer are."""
    cached = torch.stack([leaves[v].detach()[0].transpose(0, 1) for _, v in places], dim=1)
    return PrefixGradients(
        [gradients[k][0] for k, _ in places], [gradients[v][0] for _, v in places], cached
    )
