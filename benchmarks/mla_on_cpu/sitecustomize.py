"""Put this folder on PYTHONPATH to measure models with latents on vLLM's CPU build.

vLLM 0.32's CPU operator for RoPE is right for rows of all heads, [tokens, heads * size], and wrong
for [tokens, heads, size], which models with latents give it: it takes heads for what are strides,
and rotates the one key of a latent nine times. Reloads stay exact, but a trained model does not
compute what it was trained to. Here the operator is given rows.
"""

from __future__ import annotations

import sys
from typing import Any


def _in_rows(forward: Any) -> Any:
    def rotated(self: Any, positions: Any, query: Any, key: Any = None) -> Any:
        given = [x for x in (query, key) if x is not None]
        rows = [x.reshape(x.shape[0], -1).contiguous() for x in given]
        forward(self, positions, *rows)
        turned = [x.view(y.shape) for x, y in zip(rows, given, strict=True)]
        return turned[0], turned[1] if key is not None else None

    return rotated


class _Patch:
    """Patches the class when vLLM's module has been imported, and is asked about nothing else."""

    name = "vllm.model_executor.layers.rotary_embedding.base"

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            kind = module.RotaryEmbedding
            kind.forward_cpu = _in_rows(kind.forward_cpu)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Patch())
