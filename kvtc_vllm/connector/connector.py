"""`KVTCConnector`: vLLM's connector interface, delegating to our two sides.

vLLM builds one instance in the engine core (role SCHEDULER) and one in each
worker (role WORKER, after the model was loaded). Methods only translate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvtc_vllm.config import KVTCConfig, load_config
from kvtc_vllm.connector.artifact_lookup import look_up, record_bounds
from kvtc_vllm.connector.block_reuse import block_reuse
from kvtc_vllm.connector.latent_ratio import with_latent_ratio
from kvtc_vllm.connector.memory_tier import with_joint
from kvtc_vllm.connector.messages import ReportMessage, StepMessage, WorkerStart
from kvtc_vllm.connector.metrics import KVTCPromMetrics, KVTCStats
from kvtc_vllm.connector.one_copy import wants_one_copy
from kvtc_vllm.connector.rounds import rounds_of_engine, shares_experts
from kvtc_vllm.connector.stages import world_rank
from kvtc_vllm.connector.startup import CodecFactory, build_worker
from kvtc_vllm.offload.geometry import check_budget, check_chunks, with_whole_blocks
from kvtc_vllm.offload.messages import StepMetadata
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.offload.stats import Stats
from kvtc_vllm.vllm_cache.compat import (
    check_stable_hashes,
    check_version,
    source_of_hits,
    vllm_version,
)
from kvtc_vllm.vllm_cache.geometry import read_geometry
from kvtc_vllm.vllm_cache.media import check_media_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvtc_vllm.offload.worker import KVTCWorker

logger = logging.getLogger("vllm.kvtc")


class KVTCConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps offloaded KV blocks KVTC-encoded in host memory."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
        *,
        config: KVTCConfig | None = None,
        codec_factory: CodecFactory | None = None,
    ) -> None:
        """vLLM gives the first three. config: instead of what the user's JSON says."""
        check_version(vllm_version())
        super().__init__(vllm_config, role, kv_cache_config)
        self._codec_factory = codec_factory
        self._rounds = rounds_of_engine() if role == KVConnectorRole.WORKER else None
        with self._rounds or nullcontext():
            bounds = self._read_set_up(vllm_config, kv_cache_config, config, codec_factory, role)
        self._scheduler: KVTCScheduler | None = None
        self._make_scheduler: Callable[..., KVTCScheduler] | None = None
        self._block_pool: Any = None
        self._worker: KVTCWorker | None = None
        source = source_of_hits()
        if source is not None:
            self._cache_hit_source = source
        if role == KVConnectorRole.SCHEDULER:
            transfer = self._kv_transfer_config
            self._make_scheduler = partial(
                KVTCScheduler,
                self._config,
                self._geometry,
                bounds,
                prompt_only=not self._config.store_decode
                or vllm_config.speculative_config is not None,
                loads=transfer.is_kv_consumer,
                stores=transfer.is_kv_producer,
                reuse=block_reuse(vllm_config, kv_cache_config, self._geometry),
                shares_experts=shares_experts(vllm_config),
            )
            if not self._one_copy:  # else workers tell whether they have memory for it
                self._begin_scheduling(one_copy=False)
            if transfer.kv_load_failure_policy != "recompute":
                # Read by vLLM's scheduler after it has made its connector.
                transfer.kv_load_failure_policy = "recompute"
                logger.info(
                    "kvtc: kv_load_failure_policy set to 'recompute': a chunk that can't be "
                    "read costs its prefill, never the request"
                )

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped store is a later miss, nothing more."""
        return False

    # ------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start-up of a worker: artifact, codec, self-test."""
        with self._rounds or nullcontext():
            self._worker = build_worker(
                self._vllm_config,
                self._lookup,
                self._geometry,
                kv_caches,
                self._codec_factory,
                self._one_copy,
                self._rounds,
            )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What this rank has on disk. Called once, after the caches were registered."""
        entries, one_copy = self._live_worker.inventory(), self._live_worker.one_copy
        return WorkerStart(entries, one_copy) if entries is not None or one_copy else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Stage what this step's forward is going to overwrite: vLLM calls it before, always."""
        assert isinstance(kv_connector_metadata, StepMessage)
        self._live_worker.before_forward(kv_connector_metadata.step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's asynchronous loads."""
        self._live_worker.begin_step(self._step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads complete before their request is scheduled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: chunks span layers and are gathered after the forward."""

    def wait_for_save(self) -> None:
        """Stage the blocks that this step completed."""
        self._live_worker.store(self._step)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads ended since the last step."""
        finished = self._live_worker.poll(self._step.idle)
        return None, finished or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """As `get_finished`; names requests to compute again where blocks can't tell.

        vLLM 0.30 and later ask for it.
        """
        results = super().get_transfer_results(finished_req_ids)
        if not self._geometry.keeps_all:
            results.failed_recving.update(self._live_worker.failed_loads)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks to recompute, where vLLM can keep what comes before them."""
        blocks = self._live_worker.take_bad_blocks()
        return blocks if self._geometry.keeps_all else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Sizes and failures for the scheduler."""
        report = self._live_worker.take_report()
        return None if report is None else ReportMessage(report)

    def shutdown(self) -> None:
        """Stop the worker's threads."""
        if self._worker is not None:
            self._worker.shutdown()

    # --------------------------------------------------------------- scheduler

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """What all ranks of one stage have on disk, before the first request."""
        self._restore(metadata)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """The same of all pipeline stages, by stage and rank in it."""
        self._restore(
            {
                world_rank(self._geometry, stage, rank): found
                for (stage, rank), found in metadata.items()
            }
        )

    def _restore(self, starts: Mapping[int, Any]) -> None:
        """starts: by rank of all. `MultiConnector` gives every connector the first one's."""
        ours = {r: found for r, found in starts.items() if isinstance(found, WorkerStart)}
        if len(ours) < len(starts) and self._config.disk_path is not None:
            logger.warning(
                "kvtc: another connector's handshake came instead of ours, so what is on disk from "
                "before is not offered until it is stored again"
            )
        if self._scheduler is None:
            self._begin_scheduling(any(found.one_copy for found in ours.values()))
        entries = {rank: found.entries for rank, found in ours.items()}
        self._live_scheduler.restore(
            {r: found for r, found in entries.items() if found is not None}
        )

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Lets the scheduler's side see what vLLM's own prefix cache evicts, and its resets."""
        self._block_pool = gpu_block_pool
        if self._scheduler is not None:
            self._scheduler.bind_gpu_blocks(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that the tier can add to the GPU prefix cache's, always asynchronously.

        None while chunks are on their way from disk into memory, another request loads the same
        prefix, or the contents of a LoRA adapter are not known.
        """
        tokens = self._live_scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of the blocks that were allocated for it."""
        self._live_scheduler.plan_load(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The workers' orders for this step."""
        return StepMessage(self._live_scheduler.plan_step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' results of a step."""
        message = connector_output.kv_connector_worker_meta
        assert message is None or isinstance(message, ReportMessage)
        report = None if message is None else message.report
        self._live_scheduler.apply_report(report, connector_output.finished_recving)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once: what is to be kept was staged in time."""
        self._live_scheduler.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`: no block is kept for a store, of whatever group."""
        return self.request_finished(request, block_ids[0] if block_ids else [])

    def has_pending_push_work(self) -> bool:
        """Keeps an idle engine stepping until running stores have been reported."""
        return self._live_scheduler.has_pending_work()

    def reset_cache(self) -> bool | None:
        """Offer nothing that was stored before; files stay for other engines."""
        self._live_scheduler.reset()
        return True

    def take_events(self) -> Iterable[Any]:
        """No KV events."""
        return ()

    # ----------------------------------------------------------------- metrics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counters of this side since the last call."""
        stats: Stats | None
        if self._worker is not None:
            stats = self._worker.take_stats()
        else:
            stats = self._live_scheduler.take_stats()
        return None if stats is None else KVTCStats(data=stats.data)

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        """Rebuild statistics in the front-end process."""
        return KVTCStats(data=data) if data is not None else KVTCStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Register `vllm:kvtc_*`."""
        return KVTCPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ----------------------------------------------------------------- private

    def _read_set_up(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        config: KVTCConfig | None,
        codec_factory: CodecFactory | None,
        role: KVConnectorRole,
    ) -> list[int]:
        """Configuration, geometry and artifact; returns the most bytes of a record by group."""
        transfer = self._kv_transfer_config
        self._config = config or load_config(transfer.kv_connector_extra_config)
        if self._config.disk_path is not None:
            algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
            check_stable_hashes(vllm_version(), algorithm)
            check_media_names(vllm_config)
        self._geometry = read_geometry(vllm_config, kv_cache_config)
        if "chunk_tokens" not in transfer.kv_connector_extra_config:
            self._config = with_whole_blocks(self._config, self._geometry)
        self._config = with_latent_ratio(
            self._config, self._geometry, transfer.kv_connector_extra_config
        )
        self._one_copy = wants_one_copy(
            self._config,
            self._geometry,
            foreign=codec_factory is not None,
            says=role == KVConnectorRole.WORKER,
        )
        self._config = with_joint(
            self._config,
            len(self._geometry.groups),
            vllm_config.device_config.device_type,
            foreign=codec_factory is not None,
            one_copy=self._one_copy,
            says=role == KVConnectorRole.WORKER,
        )
        # Both sides check, so that the worker, made first, fails before it loads an artifact.
        check_chunks(self._config, self._geometry)
        self._lookup = look_up(vllm_config.model_config, self._config, self._geometry)
        self._config = self._lookup.config
        bounds = record_bounds(vllm_config.model_config, self._lookup, self._geometry)
        self._bound = sum(bounds)
        check_budget(self._config, 1 if self._one_copy else self._geometry.ranks, self._bound)
        return bounds

    @property
    def _live_worker(self) -> KVTCWorker:
        assert self._worker is not None, "register_kv_caches was not called"
        return self._worker

    @property
    def _live_scheduler(self) -> KVTCScheduler:
        if self._scheduler is None:
            self._begin_scheduling(one_copy=False)  # no worker told that it shares anything
        assert self._scheduler is not None
        return self._scheduler

    def _begin_scheduling(self, one_copy: bool) -> None:
        assert self._make_scheduler is not None, "scheduler method called on a worker"
        if not one_copy:
            check_budget(self._config, self._geometry.ranks, self._bound)
        self._scheduler = self._make_scheduler(one_copy=one_copy)
        if self._block_pool is not None:
            self._scheduler.bind_gpu_blocks(self._block_pool)

    @property
    def _step(self) -> StepMetadata:
        message = self._get_connector_metadata()
        assert isinstance(message, StepMessage)
        return message.step
