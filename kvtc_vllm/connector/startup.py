"""Start-up of one worker: RoPE, codec, self-test, names, tiers, one line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from kvtc_vllm.artifact.identity import model_identity, public_model_name
from kvtc_vllm.codec.base import Coder
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import ConfigError, KVTCConfig
from kvtc_vllm.connector.artifact_lookup import Lookup
from kvtc_vllm.connector.halver import make_halver
from kvtc_vllm.connector.identity import setup_identity
from kvtc_vllm.connector.memory_tier import make_memory
from kvtc_vllm.connector.one_copy import share_memory
from kvtc_vllm.connector.rank_artifacts import load_artifacts
from kvtc_vllm.connector.rounds import Rounds, among_engines
from kvtc_vllm.connector.scales import find_scales, joined_scales
from kvtc_vllm.connector.sizing import log_plan, plan_memory
from kvtc_vllm.connector.stages import stage_layers, worker_rank
from kvtc_vllm.connector.state_transfer import StateTransfer
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.connector.transfers import Served, build_transfer
from kvtc_vllm.connector.warm_up import warm_up
from kvtc_vllm.offload.adapters import LoadedAdapters
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.namespace import open_in_time
from kvtc_vllm.offload.setup_identity import SetupIdentity
from kvtc_vllm.offload.transfer import Transfer
from kvtc_vllm.offload.weights import WeightsWatch
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord
from kvtc_vllm.tiers.shared_arena import SharedView
from kvtc_vllm.vllm_cache.compat import vllm_version
from kvtc_vllm.vllm_cache.layout import paged_layouts
from kvtc_vllm.vllm_cache.live_model import LiveModel
from kvtc_vllm.vllm_cache.rotary import find_ropes, joined_ropes

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.kvtc")

CodecFactory = Callable[[int, CacheGroup, tuple[Rope, ...], tuple[int | None, ...]], Coder]
"""Makes what codes chunks instead of the configured codec: from the cache group's number among
those of attention, the group, the live RoPE tables and each layer's index into them. For
measurements; blobs of it are only read by the engine that wrote them, so it does not go with a disk
tier."""


def build_worker(
    vllm_config: VllmConfig,
    lookup: Lookup,
    geometry: CacheGeometry,
    kv_caches: dict[str, torch.Tensor],
    codec_factory: CodecFactory | None = None,
    one_copy: bool = False,
    rounds: Rounds | None = None,
) -> KVTCWorker:
    """Everything a rank needs before its first step.

    one_copy: the first rank is to keep what all have, for all, if it has memory that they can read.
    rounds: of an engine with several ranks, all of which start together. Raises ArtifactError or
    UnsupportedError, one clear line, if it can't serve.
    """
    shared = None
    if one_copy:
        assert rounds is not None
        shared = share_memory(lookup.config, worker_rank(geometry).tensor, rounds)
    config, place = lookup.config, worker_rank(geometry)
    layers = None
    if geometry.pp_size > 1:
        layers = stage_layers(vllm_config.model_config, geometry)[place.stage]
    view = shared if isinstance(shared, SharedView) else None
    # What the first rank keeps is coded by its artifact, whoever reads it.
    coder = place.tensor if shared is None else 0
    device = next(iter(kv_caches.values())).device
    step_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    measured = partial(plan_memory, config, geometry, device, step_tokens)
    groups, layouts = geometry.coded_groups, paged_layouts(kv_caches, geometry)
    live = LiveModel(vllm_config, [n for group in geometry.groups for n in group.layer_names])
    rotations = [find_ropes(vllm_config, group.layer_names, live) for group in groups]
    scales = [find_scales(vllm_config, group) for group in groups]
    found = load_artifacts(lookup.directory, groups, coder, layers, rotations, scales)
    served = [
        build_transfer(part, config, layout, group, measured, share=len(groups))
        for part, layout, group in zip(found, layouts, groups, strict=True)
    ]
    # Again, now that the bases of all groups are on the device.
    plan = measured()
    _log_start(lookup, geometry, place.world, served)
    if device.type == "cuda":
        log_plan(plan, geometry, sum(one.resident for one in served), step_tokens)
    coded: list[Transfer] = [one.transfer for one in served]
    if codec_factory is not None:
        coded = [
            TorchTransfer(layout, codec_factory(number, group, *rotation), config.chunk_tokens)
            for number, (group, layout, rotation) in enumerate(
                zip(groups, layouts, rotations, strict=True)
            )
        ]
    states = [
        StateTransfer(kv_caches, group, config.rounds_states)
        for group in geometry.groups
        if group.state_bytes
    ]
    of_states, of_attention = iter(states), iter(coded)
    transfers = [next(of_states if g.state_bytes else of_attention) for g in geometry.groups]
    codecs = [*(transfer.codec for transfer in states), *(one.codec for one in served)]
    fingerprint = b"".join(part.artifact.fingerprint for part in found if part is not None)
    ropes, layer_rope = joined_ropes(rotations)
    setup = setup_identity(
        vllm_config,
        config,
        geometry,
        place.world,
        files=lookup.files or _raw_model_fingerprint(vllm_config.model_config, config),
        artifact=fingerprint,
        ropes=ropes,
        layer_rope=layer_rope,
        scales=joined_scales(scales, groups),
        # On a GPU the bases of no other are resident: those chunks must not be offered.
        only_ratio=config.target_ratio if any(found) and device.type != "cpu" else None,
        one_copy=shared is not None,
    )
    check_digested(setup, config)
    record = _record(vllm_config, config, geometry, place.world, fingerprint, setup)
    names = Names(
        codecs,
        setup,
        _watch(live, vllm_config),
        LoadedAdapters(live.lora_manager),
        partial(_open_store, config, record)
        if config.disk_path is not None and view is None
        else None,
        may_sleep=bool(vllm_config.model_config.enable_sleep_mode),
        gather=rounds,
        one_name=shared is not None,
        engines=among_engines(vllm_config),
    )
    names.rename(b"")
    if rounds is not None:
        rounds.started()
    disk = _open_disk(config, geometry, names, place.world, plan.staging)
    worker = KVTCWorker(
        config,
        geometry,
        transfers,
        device,
        plan.staging,
        place.world,
        names,
        disk,
        make_memory(config, geometry, codecs, shared),
        make_halver(config, codecs, device),
        view,
    )
    if device.type == "cuda":
        of_group = [n for n, group in enumerate(geometry.groups) if not group.state_bytes]
        for number, layout in zip(of_group, layouts, strict=True):
            warm_up(worker, layout, number, config.chunk_tokens, step_tokens, plan.staging)
    return worker


def _record(
    vllm_config: VllmConfig,
    config: KVTCConfig,
    geometry: CacheGeometry,
    rank: int,
    artifact: bytes,
    setup: SetupIdentity,
) -> NamespaceRecord:
    """What people are told about this rank's chunks on disk. artifact: fingerprint."""
    return NamespaceRecord(
        model=public_model_name(vllm_config.model_config.model),
        codec=config.codec,
        dtype=str(geometry.groups[0].dtype).removeprefix("torch."),
        rank=rank,
        tp_size=geometry.ranks,
        artifact=artifact.hex(),
        ratio=config.target_ratio,
        vllm_version=vllm_version(),
        most_bytes=_most_bytes(config, geometry),
        facts=setup.short_facts(),
    )


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
    threads, deadline = config.disk_threads, config.load_deadline
    return DiskWorker(namespace, threads, deadline, queue_bytes, geometry.ranks)


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


def _log_start(lookup: Lookup, geometry: CacheGeometry, rank: int, served: list[Served]) -> None:
    """A line per cache group that has an artifact, one in all where none is needed."""
    config, groups = lookup.config, geometry.coded_groups
    if lookup.directory is None:
        logger.info(
            "kvtc: rank %d/%d codec %s, %d tokens per chunk, memory tier %.1f MiB",
            rank,
            geometry.ranks,
            config.codec,
            config.chunk_tokens,
            config.memory_capacity / 2**20,
        )
        return
    for one, group in zip(served, groups, strict=True):
        codec = one.codec
        assert isinstance(codec, TransformCodec)
        logger.info(
            "kvtc: rank %d/%d codec %s %gx (%gx of %s), artifact %s, %d layer group(s), "
            "bases %.1f MiB on %s, %d tokens per chunk, memory tier %.1f MiB",
            rank,
            geometry.ranks,
            codec.name,
            codec.ratio,
            # Plans count 16-bit elements.
            codec.ratio * codec.dtype.itemsize / 2,
            str(codec.dtype).removeprefix("torch."),
            lookup.directory.name + ("" if len(groups) == 1 else f" ({group.reach})"),
            len(codec.artifact.geometry.layer_groups),
            codec.resident_bytes / 2**20,
            codec.device,
            config.chunk_tokens,
            config.memory_capacity / 2**20,
        )
