"""Start-up of one worker: RoPE, artifact, codec, self-test, one line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity, public_model_name
from kvtc_vllm.codec.artifact import Kind, RankArtifact
from kvtc_vllm.codec.base import ChunkCodec, Coder
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.cpu import delta_coder
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.connector.artifact_lookup import find_artifact
from kvtc_vllm.connector.compat import vllm_version
from kvtc_vllm.connector.identity import setup_identity
from kvtc_vllm.connector.layout import paged_layouts
from kvtc_vllm.connector.live_model import LiveModel
from kvtc_vllm.connector.rotary import find_ropes, joined_ropes
from kvtc_vllm.connector.scales import find_scales, joined_scales
from kvtc_vllm.connector.sizing import log_plan, plan_memory
from kvtc_vllm.connector.stages import stage_artifact, stage_layers, worker_rank
from kvtc_vllm.connector.state_transfer import StateTransfer
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.connector.transfers import FoundArtifact, build_transfer
from kvtc_vllm.connector.warm_up import warm_up
from kvtc_vllm.offload.adapters import LoadedAdapters
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, codec_geometry
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.namespace import open_in_time
from kvtc_vllm.offload.setup_identity import SetupIdentity
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.offload.weights import WeightsWatch
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.blob_store import MemoryStore
from kvtc_vllm.tiers.delta_store import DeltaStore
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord
from kvtc_vllm.tiers.memory import MemoryArena
from kvtc_vllm.tiers.once_store import OnceStore

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.kvtc")

ROPE_TOLERANCE = 0.02
"""Largest difference of a live cos/sin table from the calibrated one.

Tables are rounded to the model's dtype (bf16: 2^-9 of values up to about 1.4), and a
model may be calibrated in one dtype and served in another; another RoPE differs by
far more.
"""

CodecFactory = Callable[[int, CacheGroup, tuple[Rope, ...], tuple[int | None, ...]], Coder]
"""Makes what codes chunks instead of the configured codec: from the cache group's number among
those of attention, the group, the live RoPE tables and each layer's index into them. For
measurements; blobs of it are only read by the engine that wrote them, so it does not go with a disk
tier."""


def build_worker(
    vllm_config: VllmConfig,
    config: KVTCConfig,
    geometry: CacheGeometry,
    kv_caches: dict[str, torch.Tensor],
    codec_factory: CodecFactory | None = None,
) -> KVTCWorker:
    """Everything a rank needs before its first step.

    Raises ArtifactError or UnsupportedError, one clear line, if it can't serve.
    """
    place = worker_rank(geometry)
    rank = place.world
    layers = None
    if geometry.pp_size > 1:
        layers = stage_layers(vllm_config.model_config, geometry)[place.stage]
    groups = geometry.coded_groups
    layouts = paged_layouts(kv_caches, geometry)
    states = [
        StateTransfer(kv_caches, group, config.rounds_states)
        for group in geometry.groups
        if group.state_bytes
    ]
    device = next(iter(kv_caches.values())).device
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    live = LiveModel(vllm_config, [n for group in geometry.groups for n in group.layer_names])
    rotations = [find_ropes(vllm_config, group.layer_names, live) for group in groups]
    scales = [find_scales(vllm_config, group) for group in groups]
    measured = partial(plan_memory, config, geometry, device, step_tokens)
    found: list[FoundArtifact | None] = [None] * len(groups)
    if not CODECS[config.codec].needs_artifact:
        files = _raw_model_fingerprint(vllm_config.model_config, config)
    else:
        directory, files = find_artifact(vllm_config.model_config, config, geometry)
        found = [
            _load_artifact(
                group_directory(directory, number),
                group,
                place.tensor,
                layers,
                *rotation,
                scale,
            )
            for number, (group, rotation, scale) in enumerate(
                zip(groups, rotations, scales, strict=True)
            )
        ]
    served = [
        build_transfer(part, config, layout, group, measured, share=len(groups))
        for part, layout, group in zip(found, layouts, groups, strict=True)
    ]
    fingerprint = b"".join(part.artifact.fingerprint for part in found if part is not None)
    # Again, now that the bases of all groups are on the device.
    plan = measured()
    if not CODECS[config.codec].needs_artifact:
        logger.info(
            "kvtc: rank %d/%d codec %s, %d tokens per chunk, memory tier %.1f MiB",
            rank,
            geometry.ranks,
            config.codec,
            config.chunk_tokens,
            config.memory_capacity / 2**20,
        )
    for part, one, group in zip(found, served, groups, strict=True):
        if part is not None and isinstance(one.codec, TransformCodec):
            own = "" if len(groups) == 1 else f" ({group.reach})"
            _log_start(one.codec, config, rank, geometry.ranks, directory.name + own)
    if device.type == "cuda":
        log_plan(plan, geometry, sum(one.resident for one in served), step_tokens)
    codecs = [*(transfer.codec for transfer in states), *(one.codec for one in served)]
    coded: list[Transfer] = [one.transfer for one in served]
    if codec_factory is not None:
        coded = [
            TorchTransfer(layout, codec_factory(number, group, *rotation), config.chunk_tokens)
            for number, (group, layout, rotation) in enumerate(
                zip(groups, layouts, rotations, strict=True)
            )
        ]
    of_states, of_attention = iter(states), iter(coded)
    transfers = [next(of_states if g.state_bytes else of_attention) for g in geometry.groups]
    ropes, layer_rope = joined_ropes(rotations)
    setup = setup_identity(
        vllm_config,
        config,
        geometry,
        rank,
        files=files,
        artifact=fingerprint,
        ropes=ropes,
        layer_rope=layer_rope,
        scales=joined_scales(scales, groups),
        # On a GPU the bases of no other are resident: those chunks must not be offered.
        only_ratio=config.target_ratio if any(found) and device.type != "cpu" else None,
    )
    check_digested(setup, config)
    record = NamespaceRecord(
        model=public_model_name(vllm_config.model_config.model),
        codec=config.codec,
        dtype=str(geometry.groups[0].dtype).removeprefix("torch."),
        rank=rank,
        tp_size=geometry.ranks,
        artifact=fingerprint.hex(),
        ratio=config.target_ratio,
        vllm_version=vllm_version(),
        most_bytes=_most_bytes(config, geometry),
        facts=setup.short_facts(),
    )
    names = Names(
        codecs,
        setup,
        _watch(live, vllm_config),
        LoadedAdapters(live.lora_manager),
        partial(_open_store, config, record) if config.disk_path is not None else None,
        may_sleep=bool(vllm_config.model_config.enable_sleep_mode),
    )
    names.rename(b"")
    disk = _open_disk(config, geometry, names, rank, plan.staging)
    memory: MemoryStore = MemoryArena(config.memory_capacity // geometry.ranks)
    if config.joint == "exact":
        memory = OnceStore(memory, HEADER_BYTES, CHECKSUM_BYTES)
    elif config.joint == "delta":
        memory = _delta_store(memory, config, codecs)
    worker = KVTCWorker(
        config, geometry, transfers, device, plan.staging, rank, names, disk, memory
    )
    if device.type == "cuda":
        of_group = [n for n, group in enumerate(geometry.groups) if not group.state_bytes]
        for number, layout in zip(of_group, layouts, strict=True):
            warm_up(worker, layout, number, config.chunk_tokens, step_tokens, plan.staging)
    return worker


def _delta_store(
    memory: MemoryStore, config: KVTCConfig, codecs: Sequence[ChunkCodec]
) -> DeltaStore:
    """Raises ConfigError where it can't be."""
    if len(codecs) > 1:
        raise ConfigError(
            f"joint='delta' is for models with one cache group, this one has {len(codecs)}; set "
            "joint='exact' or 'off'"
        )
    coder = delta_coder()
    if coder is None:
        raise ConfigError("joint='delta' needs numba, which is not installed; install it")
    (codec,) = codecs
    assert isinstance(codec, TransformCodec)
    return DeltaStore(memory, coder(codec.artifact, replace(ENTROPY, level=config.deflate_level)))


def check_digested(setup: SetupIdentity, config: KVTCConfig) -> None:
    """Raise ConfigError if chunks are to outlive this engine and nobody can say what made them."""
    if setup.undigested and config.disk_path is not None:
        raise ConfigError(
            f"disk_path={config.disk_path!r} needs a configuration that can be compared with "
            f"another engine's, and {', '.join(setup.undigested)} can't be; use plain values "
            "there, or no disk tier"
        )


def _most_bytes(config: KVTCConfig, geometry: CacheGeometry) -> int:
    """Of a record in a namespace, whatever its target ratio: engines of others share the namespace.

    No plan takes more than 16 bits per element and some scales; a cache may have 8. States may
    grow a little where they can't be compressed.
    """
    states = sum(len(group.layer_names) * group.state_bytes for group in geometry.groups)
    return 4 * config.chunk_tokens * geometry.token_bytes + 2 * states + 2**20


def _watch(live: LiveModel, vllm_config: VllmConfig) -> WeightsWatch:
    """Expert-parallel load balancing moves the weights of experts between ranks all the time."""
    balances = getattr(vllm_config.parallel_config, "enable_eplb", False)
    return WeightsWatch(live.roots(), moving=".experts." if balances else None)


def _open_store(
    config: KVTCConfig, record: NamespaceRecord, identity: bytes, generation: bytes
) -> DiskStore:
    assert config.disk_path is not None
    return DiskStore(
        Path(config.disk_path).expanduser(),
        identity,
        capacity=config.disk_capacity,
        min_free=config.disk_reserve,
        most_bytes=record.most_bytes,
        namespace_record=msgspec.structs.replace(
            record, generation=generation.hex(), created=int(time.time())
        ),
    )


def _open_disk(
    config: KVTCConfig, geometry: CacheGeometry, names: Names, rank: int, queue_bytes: int
) -> DiskWorker | None:
    """This rank's part of the disk tier. Raises ConfigError if the directory can't be used."""
    namespace = names.namespace(b"")
    if namespace is None:
        return None
    try:
        open_in_time(namespace)
    except DiskError as error:
        raise ConfigError(f"disk_path={config.disk_path!r} can't be used: {error}") from error
    logger.info(
        "kvtc: rank %d/%d disk tier %s, at most %.1f GiB, write-%s",
        rank,
        geometry.ranks,
        config.disk_path,
        config.disk_capacity / 2**30,
        config.disk_write,
    )
    return DiskWorker(namespace, config.disk_threads, config.load_deadline, queue_bytes)


def _load_artifact(
    directory: Path,
    group: CacheGroup,
    rank: int,
    layers: tuple[int, int] | None,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    scales: dict[Kind, torch.Tensor] | None,
) -> FoundArtifact:
    """A cache group's artifact, with the live RoPE tables and scales.

    layers: first and end of those of this pipeline stage; None: all.
    """
    artifact, _, probe = load_rank_artifact(directory, rank)
    if layers is not None:
        artifact = stage_artifact(artifact, *layers)
        probe = replace(probe, k=probe.k[:, slice(*layers)], v=probe.v[:, slice(*layers)])
    expected = codec_geometry(group, artifact.geometry.layer_groups)
    if artifact.geometry != expected:
        raise ArtifactError(
            f"{directory}: calibrated for {artifact.geometry}, the engine's cache is {expected}"
        )
    check_ropes(artifact, ropes, layer_rope, directory)
    # The live tables may be longer or of another dtype; they are what the cache was made with.
    live = replace(artifact, ropes=ropes, layer_rope=layer_rope, scales=scales)
    return FoundArtifact(live, probe, directory)


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
                "settings of the engine, such as --hf-overrides or --max-model-len); calibrate "
                "with these settings"
            )


def _difference(live: Rope, stored: Rope, positions: int) -> float:
    a = live.cos_sin[:positions].float().cpu()
    return float((a - stored.cos_sin[:positions].float().cpu()).abs().max())


def _raw_model_fingerprint(model: ModelConfig, config: KVTCConfig) -> str:
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


def _log_start(
    codec: TransformCodec, config: KVTCConfig, rank: int, ranks: int, source: str
) -> None:
    logger.info(
        "kvtc: rank %d/%d codec %s %gx (%gx of %s), artifact %s, %d layer group(s), "
        "bases %.1f MiB on %s, %d tokens per chunk, memory tier %.1f MiB",
        rank,
        ranks,
        codec.name,
        codec.ratio,
        # Plans count 16-bit elements.
        codec.ratio * codec.dtype.itemsize / 2,
        str(codec.dtype).removeprefix("torch."),
        source,
        len(codec.artifact.geometry.layer_groups),
        codec.resident_bytes / 2**20,
        codec.device,
        config.chunk_tokens,
        config.memory_capacity / 2**20,
    )
