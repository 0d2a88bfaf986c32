"""Reads what the engine's KV cache looks like, and refuses what we can't serve."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.reach import FULL, ChunkedLocal, LastState, Reach, SlidingWindow
from kvtc_vllm.vllm_cache.cache_dtype import cache_dtype
from kvtc_vllm.vllm_cache.compat import UnsupportedError, check_failed_loads, vllm_version
from kvtc_vllm.vllm_cache.latent import is_latent, latent_sizes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

REACHES: dict[str, Callable[[Any], Reach]] = {
    "FullAttentionSpec": lambda spec: FULL,
    "MLAAttentionSpec": lambda spec: FULL,
    "SlidingWindowSpec": lambda spec: SlidingWindow(spec.sliding_window),
    "ChunkedLocalAttentionSpec": lambda spec: ChunkedLocal(spec.attention_chunk_size),
    "MambaSpec": lambda spec: LastState(),
}
"""Name of vLLM's class of a cache group -> what its attention needs. Subclasses are other things,
such as fixed sinks."""


def read_geometry(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, resumes: bool = True
) -> CacheGeometry:
    """Describe the cache, or raise UnsupportedError with one clear sentence.

    resumes: whether requests are to go on behind stored prefixes.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    _check_kinds(specs)
    if resumes:
        _check_states(specs)
        _check_prefixes(vllm_config.model_config)
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size != 1:
            flag = f"--{name.replace('_', '-')}"
            raise UnsupportedError(f"{flag}={size} is not supported; use 1")
    stages = parallel.pipeline_parallel_size
    if stages > 1 and len(specs) > 1:
        raise UnsupportedError(
            f"--pipeline-parallel-size={stages} is not supported for a model with {len(specs)} KV "
            "cache groups, of which a stage may have none; use 1, and tensor parallel instead"
        )
    groups = _cache_groups(vllm_config, kv_cache_config)
    hash_block = _hash_block(vllm_config, kv_cache_config) if len(specs) > 1 else None
    geometry = CacheGeometry(groups, parallel.tensor_parallel_size, hash_block, stages)
    if not geometry.keeps_all:
        check_failed_loads(vllm_version())
        if vllm_config.speculative_config is not None:
            raise UnsupportedError(
                "speculative decoding is not supported for models with sliding windows, local "
                "chunks or several KV cache groups, whose blocks it moves; serve them without it"
            )
    return geometry


def layer_number(name: str) -> int:
    """Index of a layer from its name: "model.layers.7.self_attn.attn" -> 7."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise UnsupportedError(f"layer name {name!r} has no number to order layers by")
    return numbers[0]


def _check_kinds(specs: Sequence[Any]) -> None:
    kinds = Counter(type(spec).__name__ for spec in specs)
    others = [kind for kind in kinds if kind not in REACHES]
    if others:
        counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        raise UnsupportedError(
            f"the model's KV cache groups are {counted}; KVTC does not read {', '.join(others)}, "
            f"only {', '.join(REACHES)}"
        )
    for spec in specs:
        per_state = 1 if _is_state(spec) else getattr(spec, "tokens_per_state", 1)
        if per_state != 1 or not getattr(spec, "prefix_cacheable", True):
            raise UnsupportedError(
                f"a KV cache group of {type(spec).__name__} keeps one state for several tokens, or "
                "none for prefixes; KVTC does not read it"
            )


def _cache_groups(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> tuple[CacheGroup, ...]:
    """Layers by kind and shape, whatever groups vLLM dealt them into; full attention first."""
    layers: dict[Any, list[tuple[str, int]]] = {}
    for table, group in enumerate(kv_cache_config.kv_cache_groups):
        named = ((name, table) for name in group.layer_names)
        layers.setdefault(_shape(group.kv_cache_spec), []).extend(named)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    groups = []
    for of_shape in layers.values():
        of_shape.sort(key=lambda layer: layer_number(layer[0]))
        spec = specs[of_shape[0][1]]
        is_state = _is_state(spec)
        sizes = (0, 0) if is_state else _head_sizes(vllm_config, spec)
        parts = _state_parts(spec) if is_state else ()
        groups.append(
            CacheGroup(
                layer_names=tuple(name for name, _ in of_shape),
                block_size=spec.block_size,
                num_kv_heads=0 if is_state else spec.num_kv_heads,
                head_size=sizes[0],
                head_size_v=sizes[1],
                dtype=torch.uint8 if is_state else cache_dtype(vllm_config, spec),
                model_dtype=vllm_config.model_config.dtype,
                reach=REACHES[type(spec).__name__](spec),
                layer_table=tuple(table for _, table in of_shape) if len(specs) > 1 else (),
                state_bytes=sum(n * dtype.itemsize for n, dtype in parts),
                state_parts=parts,
                latent=is_latent(spec),
            )
        )
    groups.sort(key=lambda group: (not group.keeps_all, layer_number(group.layer_names[0])))
    return tuple(groups)


def _shape(spec: AttentionSpec) -> tuple[Any, ...]:
    """What layers that are stored together have in common."""
    reach = REACHES[type(spec).__name__](spec)
    if _is_state(spec):
        return (reach, spec.block_size, spec.shapes, spec.dtypes)
    heads = (spec.num_kv_heads, spec.head_size, spec.head_size_v)
    return (reach, spec.block_size, *heads, spec.dtype)


def _head_sizes(vllm_config: VllmConfig, spec: AttentionSpec) -> tuple[int, int]:
    """Of K and of V."""
    if is_latent(spec):
        return latent_sizes(vllm_config, spec)
    return spec.head_size, spec.head_size_v


def _is_state(spec: Any) -> bool:
    return type(spec).__name__ == "MambaSpec"


def _state_parts(spec: Any) -> tuple[tuple[int, torch.dtype], ...]:
    """Elements and type of one layer's states at one boundary, as they lie in its page."""
    shapes = zip(spec.shapes, spec.dtypes, strict=True)
    return tuple((math.prod(shape), dtype) for shape, dtype in shapes)


def _check_states(specs: Sequence[Any]) -> None:
    """Raise UnsupportedError if vLLM keeps states nowhere but at the end of a request."""
    for spec in specs:
        mode = getattr(spec, "mamba_cache_mode", "align")
        if mode != "align":
            raise UnsupportedError(
                f"the model's recurrent layers keep states in mode {mode!r}, where no prefix can "
                "be resumed; serve it with --enable-prefix-caching, which makes it 'align'"
            )


def _check_prefixes(model_config: Any) -> None:
    """Raise UnsupportedError for models whose prefixes don't stand for themselves.

    vLLM resumes no prefix of some pooling models, but asks a connector for them all the same, and
    its worker ends at the first one.
    """
    if getattr(model_config, "is_diffusion", False):
        raise UnsupportedError(
            "a diffusion model is refused: it computes the tokens of an answer with those behind "
            "them, which no block hash covers; serve it without this package"
        )
    if getattr(model_config, "runner_type", "generate") != "pooling":
        return
    if not model_config.is_prefix_caching_supported:
        pooler = model_config.pooler_config
        raise UnsupportedError(
            f"a pooling model with seq_pooling_type={pooler.seq_pooling_type} and "
            f"tok_pooling_type={pooler.tok_pooling_type} is refused: vLLM resumes none of its "
            "prefixes, since it needs the hidden states of all tokens; serve it without this "
            "package"
        )


def _hash_block(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    _, hash_block = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    return int(hash_block)
