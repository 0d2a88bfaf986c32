"""Finds the rotary embedding of every attention layer in the live model.

The rotary module is a sibling of the attention module inside its parent
(`LlamaAttention.rotary_emb`). Wrong knowledge here costs compression, never correctness:
encoding and decoding use the same map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.vllm_cache.live_model import LiveModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def find_ropes(
    vllm_config: VllmConfig, layer_names: Sequence[str], live: LiveModel | None = None
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """Distinct rotary embeddings and, for each layer, its index into them or None.

    Called in a worker after the model was loaded. live: it, if it was looked for already.
    """
    live = live if live is not None else LiveModel(vllm_config, layer_names)
    modules: list[nn.Module] = []
    layer_rope: list[int | None] = []
    for name in layer_names:
        module = _rotary_child(live.parent(name))
        if module is None:
            layer_rope.append(None)
            continue
        known = next((i for i, m in enumerate(modules) if m is module), None)
        if known is None:
            known = len(modules)
            modules.append(module)
        layer_rope.append(known)
    return tuple(_as_rope(module) for module in modules), tuple(layer_rope)


def joined_ropes(
    of_groups: Sequence[tuple[tuple[Rope, ...], tuple[int | None, ...]]],
) -> tuple[tuple[Rope, ...], tuple[int | None, ...]]:
    """What `find_ropes` gave for several cache groups, as if for all of their layers."""
    ropes: tuple[Rope, ...] = ()
    layer_rope: tuple[int | None, ...] = ()
    for of_group, layers in of_groups:
        layer_rope += tuple(None if i is None else i + len(ropes) for i in layers)
        ropes += of_group
    return ropes, layer_rope


def _rotary_child(parent: nn.Module | None) -> nn.Module | None:
    if parent is None:
        return None
    for child in parent._modules.values():
        if child is not None and _table(child) is not None:
            return child
    return None


def _table(module: nn.Module) -> torch.Tensor | None:
    table = getattr(module, "cos_sin_cache", None)
    if table is None:
        # Phi-3 LongRoPE keeps the short and the long table in one buffer and
        # uses one of them for every position.
        both = getattr(module, "long_short_cos_sin_cache", None)
        if both is None:
            return None
        short = module.original_max_position_embeddings
        table = both[short:] if getattr(module, "use_long_rope", False) else both[:short]
    return table if isinstance(table, torch.Tensor) and table.dim() == 2 else None


def _as_rope(module: nn.Module) -> Rope:
    table = _table(module)
    assert table is not None
    return Rope(cos_sin=table.detach(), neox=bool(getattr(module, "is_neox_style", True)))
