"""Start-up of one worker: RoPE, artifact, codec, self-test, one line in the log."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from kvtc_vllm.calibration import registry
from kvtc_vllm.calibration.artifact_io import load_rank_artifact
from kvtc_vllm.calibration.identity import model_identity, public_model_name
from kvtc_vllm.codec.artifact import Geometry, RankArtifact
from kvtc_vllm.codec.codec import ChunkCodec
from kvtc_vllm.codec.container import FORMAT_VERSION
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.connector.compat import vllm_version
from kvtc_vllm.connector.disk import DiskSide, open_store
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.opening import FoundArtifact, open_transfer
from kvtc_vllm.connector.rotary import find_ropes
from kvtc_vllm.connector.scales import find_scales
from kvtc_vllm.connector.sizing import log_plan, plan_memory
from kvtc_vllm.connector.transfer import TorchTransfer, Transfer
from kvtc_vllm.connector.worker import KVTCWorker
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord

logger = init_logger("vllm.kvtc")

ROPE_TOLERANCE = 0.02
"""Largest difference of a live cos/sin table from the calibrated one.

Tables are rounded to the model's dtype (bf16: 2^-9 of values up to about 1.4), and a
model may be calibrated in one dtype and served in another; another RoPE differs by
far more.
"""


def build_worker(
    vllm_config: Any,
    config: KVTCConfig,
    geometry: CacheGeometry,
    kv_caches: dict[str, torch.Tensor],
) -> KVTCWorker:
    """Everything a rank needs before its first step.

    Raises ArtifactError or UnsupportedError, one clear line, if it can't serve.
    """
    rank = get_tensor_model_parallel_rank()
    layout = PagedLayout(kv_caches, geometry)
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    plan = plan_memory(config, geometry, layout.device, step_tokens)
    codec: ChunkCodec
    transfer: Transfer
    if config.codec == "raw":
        layers = len(geometry.layer_names)
        plain = codec_geometry(geometry, ((0, layers),))
        model = _raw_model_fingerprint(vllm_config.model_config, config)
        identity = _identity(vllm_config, config, geometry, rank, model)
        codec = RawCodec(plain, geometry.dtype, identity)
        transfer = TorchTransfer(layout, codec, config.chunk_tokens)
        logger.info(
            "kvtc: rank %d/%d codec raw, %d tokens a chunk, memory tier %.1f MiB",
            rank,
            geometry.tp_size,
            config.chunk_tokens,
            config.memory_capacity / 2**20,
        )
    else:
        found = _load_artifact(vllm_config, config, geometry, rank)
        codec, transfer = open_transfer(found, config, layout, plan.workspace)
        _log_start(codec, config, rank, geometry.tp_size, found.directory)
        if layout.device.type == "cuda":
            log_plan(plan, geometry, codec.resident_bytes, step_tokens)
    disk = _open_disk(vllm_config, config, geometry, codec, rank, plan.staging)
    return KVTCWorker(config, geometry, transfer, layout.device, plan.staging, rank, disk)


def _open_disk(
    vllm_config: Any,
    config: KVTCConfig,
    geometry: CacheGeometry,
    codec: ChunkCodec,
    rank: int,
    queue_bytes: int,
) -> DiskSide | None:
    """This rank's part of the disk tier. Raises ConfigError if the directory can't be used."""
    if config.disk_path is None:
        return None
    artifact = getattr(codec, "artifact", None)
    record = NamespaceRecord(
        model=public_model_name(vllm_config.model_config.model),
        codec=codec.name,
        dtype=str(geometry.dtype).removeprefix("torch."),
        rank=rank,
        tp_size=geometry.tp_size,
        artifact=artifact.fingerprint.hex() if artifact is not None else "",
        ratio=config.target_ratio,
        vllm_version=vllm_version(),
        created=int(time.time()),
    )
    try:
        store = open_store(
            partial(
                DiskStore,
                Path(config.disk_path).expanduser(),
                codec.identity,
                capacity=config.disk_capacity,
                min_free=config.disk_reserve,
                namespace_record=record,
            )
        )
    except DiskError as error:
        raise ConfigError(f"disk_path={config.disk_path!r} can't be used: {error}") from error
    logger.info(
        "kvtc: rank %d/%d disk tier %s, at most %.1f GiB, write-%s",
        rank,
        geometry.tp_size,
        config.disk_path,
        config.disk_capacity / 2**30,
        config.disk_write,
    )
    return DiskSide(store, config.disk_threads, config.load_deadline, queue_bytes)


def codec_geometry(geometry: CacheGeometry, layer_groups: tuple[tuple[int, int], ...]) -> Geometry:
    """The codec's view of the cache."""
    return Geometry(
        num_layers=len(geometry.layer_names),
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        head_size_v=geometry.head_size_v,
        layer_groups=layer_groups,
    )


def _load_artifact(
    vllm_config: Any, config: KVTCConfig, geometry: CacheGeometry, rank: int
) -> FoundArtifact:
    model = vllm_config.model_config
    identity = model_identity(model.model, model.revision)
    directory = registry.find(
        identity,
        tp_size=geometry.tp_size,
        ratio=config.target_ratio,
        model_name=model.model,
        artifact=config.artifact,
        registries=config.registry,
    )
    artifact, _, probe = load_rank_artifact(directory, rank)
    expected = codec_geometry(geometry, artifact.geometry.layer_groups)
    if artifact.geometry != expected:
        raise ArtifactError(
            f"{directory}: calibrated for {artifact.geometry}, the engine's cache is {expected}"
        )
    ropes, layer_rope = find_ropes(vllm_config, geometry.layer_names)
    check_ropes(artifact, ropes, layer_rope, directory)
    # The live tables may be longer or of another dtype; they are what the cache was made with.
    scales = find_scales(vllm_config, geometry)
    artifact = replace(artifact, ropes=ropes, layer_rope=layer_rope, scales=scales)
    full = _identity(
        vllm_config, config, geometry, rank, identity.identity, artifact.fingerprint, ropes
    )
    return FoundArtifact(artifact, full, probe, directory)


def check_ropes(
    artifact: RankArtifact,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    directory: Path,
) -> None:
    """Raise ArtifactError unless the live model rotates keys as the calibrated one did."""
    for layer, (ours, theirs) in enumerate(zip(layer_rope, artifact.layer_rope, strict=True)):
        if (ours is None) != (theirs is None):
            raise ArtifactError(
                f"{directory}: layer {layer} was calibrated "
                f"{'without' if theirs is None else 'with'} RoPE, the engine has it otherwise"
            )
        if ours is None or theirs is None:
            continue
        live, stored = ropes[ours], artifact.ropes[theirs]
        common = min(live.max_positions, stored.max_positions)
        same_shape = live.rotary_dim == stored.rotary_dim and live.neox == stored.neox
        if not same_shape or _difference(live, stored, common) > ROPE_TOLERANCE:
            raise ArtifactError(
                f"{directory}: RoPE of layer {layer} differs from the calibrated one (rope "
                "settings of the engine, such as rope_scaling or max_model_len); calibrate with "
                "these settings"
            )


def _difference(live: Rope, stored: Rope, positions: int) -> float:
    a = live.cos_sin[:positions].float().cpu()
    return float((a - stored.cos_sin[:positions].float().cpu()).abs().max())


def _identity(
    vllm_config: Any,
    config: KVTCConfig,
    geometry: CacheGeometry,
    rank: int,
    model_fingerprint: str,
    artifact: bytes = b"",
    ropes: tuple[Rope, ...] = (),
) -> bytes:
    """16 bytes over everything that makes a blob of this rank unusable elsewhere."""
    model = vllm_config.model_config
    digest = xxhash.xxh3_128()
    facts = (
        FORMAT_VERSION,
        config.codec,
        model_fingerprint,
        str(model.dtype),
        str(vllm_config.cache_config.cache_dtype),
        str(model.quantization),
        # What the files of the model do not say: settings that override them, made-up weights.
        _canonical(model.hf_overrides),
        model.seed if vllm_config.load_config.load_format == "dummy" else None,
        (geometry.layer_names, geometry.num_kv_heads, geometry.head_size, geometry.head_size_v),
        rank,
        vllm_config.parallel_config.tensor_parallel_size,
        # What a chunk is and what its key is made of: on disk both outlive this engine.
        config.chunk_tokens,
        vllm_config.cache_config.block_size,
        str(vllm_config.cache_config.prefix_caching_hash_algo),
    )
    digest.update(repr(facts).encode())
    digest.update(artifact)
    for rope in ropes:
        digest.update(rope.fingerprint())
    for kind, scales in (find_scales(vllm_config, geometry) or {}).items():
        digest.update(f"{kind} {scales.tolist()}".encode())
    return digest.digest()


def _canonical(overrides: Any) -> str:
    """The same text for the same overrides; vLLM takes a dictionary or a function."""
    if callable(overrides):
        return f"{overrides.__module__}.{overrides.__qualname__}"
    return json.dumps(overrides or {}, sort_keys=True, default=str)


def _raw_model_fingerprint(model: Any, config: KVTCConfig) -> str:
    """Identity of the model; in memory the raw codec, which needs no artifact, does without.

    Raises ConfigError if chunks are to outlive this engine and it is not known whose they are.
    """
    try:
        return model_identity(model.model, model.revision).identity
    except ArtifactError as error:
        if config.disk_path is not None:
            raise ConfigError(
                f"disk_path={config.disk_path!r} needs the model's files, to tell its chunks from "
                f"another model's: {error}"
            ) from error
        return str(model.model)


def _log_start(codec: KvtcCodec, config: KVTCConfig, rank: int, tp_size: int, source: Path) -> None:
    logger.info(
        "kvtc: rank %d/%d codec kvtc %gx (%gx of %s), artifact %s, %d layer group(s), "
        "bases %.1f MiB on %s, %d tokens a chunk, memory tier %.1f MiB",
        rank,
        tp_size,
        codec.ratio,
        # Plans count 16-bit elements.
        codec.ratio * codec.dtype.itemsize / 2,
        str(codec.dtype).removeprefix("torch."),
        source.name,
        len(codec.artifact.geometry.layer_groups),
        codec.resident_bytes / 2**20,
        codec.device,
        config.chunk_tokens,
        config.memory_capacity / 2**20,
    )
