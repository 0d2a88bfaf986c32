"""What makes stored KV unusable for another engine: the one place that says so.

Every field of vLLM's configuration is inside, also one that a later release adds, except those
in `LEFT_OUT`, each with the reason why it can't change the KV of a given token prefix. A field
too much costs a miss, a field too little a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from kvtc_vllm.artifact.identity import VOLATILE_KEYS
from kvtc_vllm.codec.artifact import Kind
from kvtc_vllm.codec.container import FORMAT_VERSION
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.environment import environment
from kvtc_vllm.connector.model_files import ALWAYS, WHERE_IT_IS_SO, ForeignCodeError
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.setup_identity import SetupIdentity
from kvtc_vllm.vllm_cache.compat import hash_seed_fact, vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


_PLACE = "a place; the weights are identified by content"
_IN_HF_CONFIG = "its effect is in hf_config"
_TOKENIZER = "KV belongs to token ids, wherever they come from"
_LOGITS = "what happens to logits, after KV was made"
_OUTSIDE = "how requests and results are handled outside the model"
_PERMISSION = "a permission, it changes no value"
_MEMORY = "where memory is and how much, not what is in it"
_WATCHING = "what is watched and logged"
_SAME_OPERATIONS = "how the same operations are run"
_COUNTER = "filled while the engine starts, from the memory that is free"
_BATCHES = "how requests are put into batches; a chunk depends on its prefix only"
_RANKS = "ranks, rank and layout are facts of their own"
_READING = "how files are read, not what they hold"
_PROPOSALS = "which tokens are proposed and taken; KV belongs to those taken"

LEFT_OUT: dict[str, dict[str, str]] = {
    "VllmConfig": {
        "parallel_config": _RANKS,
        "scheduler_config": _BATCHES,
        "offload_config": "where weights wait; they are the same",
        "quant_config": "made from model_config, which is inside",
        "kv_transfer_config": "the connector's own facts stand by themselves",
        "instance_id": "random",
        "weight_transfer_config": "weights that change while serving are a generation of their own",
        "aux_output_config": "what is returned besides tokens",
        **_each("compilation_config optimization_level performance_mode", _SAME_OPERATIONS),
        **_each("structured_outputs_config reasoning_config watermark_config", _LOGITS),
        **_each("observability_config logging_config profiler_config", _WATCHING),
        **_each("kv_events_config ec_transfer_config ec_manager_config shutdown_timeout", _OUTSIDE),
    },
    "ModelConfig": {
        **_each("model model_weights revision", _PLACE),
        **_each("hf_config_path hf_overrides", _IN_HF_CONFIG),
        **_each(
            "generation_config override_generation_config",
            "defaults of sampling; what Llama 4 takes from it is in hf_config",
        ),
        "max_model_len": "what it changes of RoPE is in the live tables; inside where one is not",
        "seed": "makes weights with load_format 'dummy' only, and is inside then",
        "spec_target_max_model_len": "a limit, like max_model_len",
        **_each("tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init", _TOKENIZER),
        **_each("served_model_name io_processor_plugin renderer_num_workers", _OUTSIDE),
        **_each("return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel", _LOGITS),
        **_each("logits_processors enable_trace_replay enable_return_routed_experts", _LOGITS),
        **_each("allowed_local_media_path allowed_media_domains hf_token", _PERMISSION),
        "allow_deprecated_quantization": _PERMISSION,
        **_each("enforce_eager disable_cascade_attn", _SAME_OPERATIONS),
        **_each("enable_sleep_mode sleep_preserve_parameter_names sleep_mode_backend", _MEMORY),
        **_each("sleep_mode_offload_cudagraph enable_nccl_comm_suspend", _MEMORY),
        "enable_cumem_allocator": _MEMORY,
    },
    "CacheConfig": {
        **_each("gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks_override", _MEMORY),
        **_each("kv_offloading_size kv_offloading_backend", _MEMORY),
        **_each("mamba_page_size_padded skip_page_size_padded", _MEMORY),
        "kv_cache_layout": "how blocks lie in memory; chunks are stored in one order",
        "enable_prefix_caching": "whether vLLM keeps blocks for itself",
        "prefix_cache_retention_interval": "how long vLLM keeps blocks for itself",
        **_each(
            "user_specified_block_size user_specified_mamba_block_size _block_size_resolved",
            "who chose block_size, which is inside",
        ),
        **_each("num_gpu_blocks num_cpu_blocks kv_cache_size_tokens", _COUNTER),
        "kv_cache_max_concurrency": _COUNTER,
        **_each(
            "hash_block_size cache_hit_alignment_tokens effective_attention_block_size",
            "made at start-up from block_size and prefix_match_unit, which are inside",
        ),
    },
    "LoadConfig": {
        **_each("download_dir device pt_load_map_location", _PLACE),
        **_each("safetensors_load_strategy safetensors_prefetch_num_threads", _READING),
        **_each("safetensors_prefetch_block_size use_tqdm_on_load", _READING),
    },
    "AttentionConfig": {"sparse_mla_prefill_workspace_factor": _MEMORY},
    "KernelConfig": _each("enable_cutedsl_warmup enable_jit_warmup", "when kernels are compiled"),
    "LoRAConfig": {
        **_each("max_lora_rank max_loras max_cpu_loras", _MEMORY),
        **_each("fully_sharded_loras specialize_active_lora", _SAME_OPERATIONS),
        "max_lora_cls_labels": _LOGITS,
        "default_mm_loras": "a default of requests, whose adapter is in the key of a chunk",
    },
    "MultiModalConfig": {
        **_each("mm_processor_cache_gb mm_processor_cache_type", _MEMORY),
        **_each("mm_shm_cache_max_object_size_mb mm_tensor_ipc mm_ipc_gpu_memory_gb", _MEMORY),
        "skip_mm_profiling": _MEMORY,
        "limit_per_prompt": "what a prompt may bring",
    },
    "SpeculativeConfig": {
        **_each("model revision", "a place; the draft's files are a fact of their own"),
        "target_model_config": "is model_config, which is inside",
        **_each("target_parallel_config draft_parallel_config", _RANKS),
        "enforce_eager": _SAME_OPERATIONS,
        **_each("prompt_lookup_max prompt_lookup_min", _PROPOSALS),
        **_each("suffix_decoding_max_tree_depth suffix_decoding_max_cached_requests", _PROPOSALS),
        **_each("suffix_decoding_max_spec_factor suffix_decoding_min_token_prob", _PROPOSALS),
        **_each("num_speculative_tokens_per_batch_size rejection_sample_method", _PROPOSALS),
        **_each("synthetic_acceptance_rates synthetic_acceptance_length", _PROPOSALS),
        **_each("draft_sample_method disable_eagle_block_drop", _PROPOSALS),
    },
}
"""vLLM's configuration class -> field -> why it can't change the KV of a token prefix."""

BESIDES_FIELDS = {"ModelConfig": ("hf_image_processor_config",)}
"""Attributes that count although their class doesn't declare them: pixels depend on them."""


def setup_identity(
    vllm_config: VllmConfig,
    config: KVTCConfig,
    geometry: CacheGeometry,
    rank: int,
    *,
    files: str,
    artifact: bytes = b"",
    ropes: tuple[Rope, ...] = (),
    layer_rope: tuple[int | None, ...] = (),
    scales: Mapping[Kind, torch.Tensor] | None = None,
    only_ratio: float | None = None,
    one_copy: bool = False,
) -> SetupIdentity:
    """What computed the KV of this rank, and what its chunks and their keys are.

    Called in a worker after the model was loaded, which completes vLLM's configuration. files:
    fingerprint of configuration and weight files. ropes, layer_rope: live tables and which layer
    uses which. scales: of an fp8 cache. only_ratio: of the chunks that this rank can read; None if
    it reads those of any ratio of the artifact. one_copy: the first rank keeps it for all.
    """
    inside = set()
    if any(load.load_format == "dummy" for load in _load_configs(vllm_config)):
        inside.add("seed")
    layers = sum(len(group.layer_names) for group in geometry.coded_groups)
    if len(layer_rope) < layers or None in layer_rope:
        inside.add("max_model_len")
    facts = _Facts(inside)
    for name, value in facts.parts(vllm_config):
        facts.add(name, value)
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    own = {
        "format_version": FORMAT_VERSION,
        "codec": config.codec,
        "chunk_tokens": config.chunk_tokens,
        "files": files,
        "artifact": artifact,
        "geometry": geometry,
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
        "rank": rank,
        "pipeline_parallel_size": vllm_config.parallel_config.pipeline_parallel_size,
        "ropes": [rope.fingerprint() for rope in ropes],
        "layer_rope": layer_rope,
        "scales": {kind: of_kind.tolist() for kind, of_kind in (scales or {}).items()},
        "hash_seed": hash_seed_fact(vllm_version(), algorithm),
        # Releases compute the same model in other ways.
        "vllm_version": vllm_version(),
    }
    parallel = vllm_config.parallel_config
    for name, alone in (("data_parallel_size", 1), ("enable_expert_parallel", False)):
        # Only where it is so: how experts are dealt out is how their results are summed.
        if getattr(parallel, name, alone) != alone:
            own[name] = getattr(parallel, name)
    variables = environment()
    if variables:
        own["environment"] = variables
    if only_ratio is not None:
        own["only_ratio"] = only_ratio
    if one_copy:
        own["latent_copies"] = "one"
    if geometry.has_states:
        own["state_codec"] = config.state_codec
    for name, find in (*ALWAYS.items(), *WHERE_IT_IS_SO.items()):
        try:
            found = find(vllm_config)
        except (ArtifactError, ForeignCodeError, OSError):
            facts.undigested.append(f"connector.{name}")
            continue
        if found is not None or name in ALWAYS:
            own[name] = found
    if getattr(getattr(vllm_config, "ec_transfer_config", None), "is_ec_consumer", False):
        # Images are what another engine's encoder made of them, and nobody tells by which weights.
        facts.undigested.append("ec_transfer_config")
    for name, value in own.items():
        facts.add(f"connector.{name}", value)
    return SetupIdentity(facts.texts, tuple(sorted(facts.undigested)))


def _load_configs(vllm_config: VllmConfig) -> Iterator[Any]:
    yield vllm_config.load_config
    draft = getattr(getattr(vllm_config, "speculative_config", None), "draft_load_config", None)
    if draft is not None:
        yield draft


class _Facts:
    """Canonical texts of values by dotted name, the same in every process.

    inside: fields that count here although `LEFT_OUT` names them.
    """

    def __init__(self, inside: Set[str]) -> None:
        self.texts: dict[str, str] = {}
        self.undigested: list[str] = []
        self._inside = inside
        self._open: list[int] = []

    def add(self, name: str, value: Any) -> None:
        """One fact, or the class and one fact a field if it has fields."""
        if not _has_fields(value):
            self.texts[name] = self._text(name, value)
            return
        self.texts[name] = type(value).__name__
        for key, part in self._entered(name, value):
            self.add(f"{name}.{key}", part)

    def parts(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Fields that count. Raises what the `to_dict` of `value` raises."""
        if _is_hf_config(value):
            for key, part in value.to_dict().items():
                if key not in VOLATILE_KEYS:
                    own = getattr(value, key, None)
                    # As an object: of a dictionary it is not known which keys are volatile.
                    yield key, own if _is_hf_config(own) else part
        elif is_dataclass(value):
            lineage = _lineage(value)
            rows = {key for name in lineage for key in LEFT_OUT.get(name, ())} - self._inside
            besides = (key for name in lineage for key in BESIDES_FIELDS.get(name, ()))
            for key in (*(f.name for f in fields(value)), *besides):
                if key not in rows:
                    yield key, getattr(value, key, None)
        elif isinstance(value, SimpleNamespace):
            yield from vars(value).items()
        else:
            yield from value.to_dict().items()

    def _entered(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Parts of a value that is not inside itself; none and a note if they can't be had."""
        if id(value) in self._open:
            self.undigested.append(name)
            return
        self._open.append(id(value))
        try:
            # Any error: `to_dict` may be a model's own code, and no identity is not an outage.
            yield from sorted(self.parts(value), key=lambda part: str(part[0]))
        except Exception:
            self.undigested.append(name)
        finally:
            self._open.pop()

    def _text(self, name: str, value: Any) -> str:
        # Before numbers and strings, which some enumerations are as well.
        if isinstance(value, Enum):
            return f"{type(value).__name__}.{value.name}"
        if value is None or isinstance(value, bool | int | float | complex | str):
            return repr(value)
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, torch.dtype):
            return str(value)
        if isinstance(value, torch.device):
            return value.type  # its index is a place
        if isinstance(value, PurePath):
            return repr(str(value))
        if isinstance(value, type) and _findable(value):
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, type) or not _composed(value):
            self.undigested.append(name)
            return "?"
        return self._composed_text(name, value)

    def _composed_text(self, name: str, value: Any) -> str:
        if id(value) in self._open:
            self.undigested.append(name)
            return "?"
        if _has_fields(value):
            pairs: Iterable[tuple[Any, Any]] = self._entered(name, value)
            inner = (f"{key}: {self._text(f'{name}.{key}', part)}" for key, part in pairs)
            return f"{type(value).__name__}({', '.join(inner)})"
        self._open.append(id(value))
        try:
            if isinstance(value, Mapping):
                inner = (
                    f"{self._text(name, key)}: {self._text(f'{name}.{key}', part)}"
                    for key, part in value.items()
                )
                return f"{{{', '.join(sorted(inner))}}}"
            texts = [self._text(f"{name}.{i}", part) for i, part in enumerate(value)]
            if isinstance(value, Set):
                return f"set({', '.join(sorted(texts))})"
            return f"[{', '.join(texts)}]"
        finally:
            self._open.pop()


def _is_hf_config(value: Any) -> bool:
    """Whether it is a configuration of transformers, in either spelling of its base class."""
    return any(name in ("PretrainedConfig", "PreTrainedConfig") for name in _lineage(value))


def _lineage(value: Any) -> list[str]:
    return [cls.__name__ for cls in type(value).__mro__]


def _has_fields(value: Any) -> bool:
    if isinstance(value, type | Mapping):
        return False
    return (
        is_dataclass(value)
        or isinstance(value, SimpleNamespace)
        or callable(getattr(value, "to_dict", None))
    )


def _composed(value: Any) -> bool:
    return _has_fields(value) or isinstance(value, Mapping | Sequence | Set)


def _findable(cls: type) -> bool:
    """Whether its name says which class it is, in another program too."""
    return "<locals>" not in cls.__qualname__ and cls.__module__ not in ("__main__", "__mp_main__")
