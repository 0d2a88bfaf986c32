"""Finds the model in a worker process: its attention layers' parents, its roots, its adapters.

vLLM hands a connector neither the model nor its runner. Attention modules are known by layer
name, and one pass over the live objects of the process finds whoever holds them.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LiveModel:
    """What a worker has loaded, as of one look; takes about a second.

    layer_names: attention layers of the KV cache. Make it in a worker after the model was loaded.
    """

    def __init__(self, vllm_config: VllmConfig, layer_names: Sequence[str]) -> None:
        context = vllm_config.compilation_config.static_forward_context
        self._layers: dict[str, nn.Module] = {
            name: context[name] for name in layer_names if name in context
        }
        self._parents: dict[int, nn.Module] = {}
        managers: list[Any] = []
        manager = _lora_manager_class() if vllm_config.lora_config is not None else None
        for candidate in gc.get_objects():
            # The type, not isinstance: the latter asks lazy proxies for their __class__.
            kind = type(candidate)
            if issubclass(kind, nn.Module):
                for child in candidate._modules.values():
                    self._parents[id(child)] = candidate
            elif manager is not None and issubclass(kind, manager):
                managers.append(candidate)
        roots = {id(root) for root in self.roots()}
        self.lora_manager: Any | None = next(
            (m for m in managers if id(m._adapter_manager.model) in roots), None
        )
        """vLLM's keeper of this model's LoRA adapters, if it has any."""

    def parent(self, layer_name: str) -> nn.Module | None:
        """The module that holds an attention layer: in Llama its `LlamaAttention`."""
        layer = self._layers.get(layer_name)
        return None if layer is None else self._parents.get(id(layer))

    def roots(self) -> list[nn.Module]:
        """The module trees that hold the attention layers: the model, and a draft model."""
        found: dict[int, nn.Module] = {}
        for layer in self._layers.values():
            module: nn.Module = layer
            seen = {id(module)}
            while (parent := self._parents.get(id(module))) is not None and id(parent) not in seen:
                module = parent
                seen.add(id(module))
            found[id(module)] = module
        return list(found.values())


def _lora_manager_class() -> type:
    from vllm.lora.worker_manager import WorkerLoRAManager

    return WorkerLoRAManager
