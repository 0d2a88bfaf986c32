"""`KVTCCaptureConnector`: copies sampled tokens out of the paged cache for calibration.

It reads pages and finds RoPE with the code that serves later, so what is
calibrated is what will be coded, for any model and tensor-parallel size that
vLLM runs. Requests steer it through `kv_transfer_params`:

    {"kvtc_doc": int, "kvtc_heldout": bool, "kvtc_keep": float}   sample this prompt
    {"kvtc_close": true}                                          finish the spool

`kv_connector_extra_config`: {"spool": DIR, "seed": int, "sink_tokens": int}. Rank r writes to
DIR/rank{r}, and what further cache groups hold of the same tokens to DIR/group{g}/rank{r}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.calibration.spool import DTYPES, SpoolHeader, SpoolWriter
from kvtc_vllm.offload.block_tables import BlockTables
from kvtc_vllm.offload.geometry import CacheGroup, codec_geometry
from kvtc_vllm.vllm_cache.cache_dtype import is_fp8
from kvtc_vllm.vllm_cache.compat import UnsupportedError, check_version, vllm_version
from kvtc_vllm.vllm_cache.geometry import layer_number, read_geometry
from kvtc_vllm.vllm_cache.layout import paged_layouts
from kvtc_vllm.vllm_cache.live_model import LiveModel
from kvtc_vllm.vllm_cache.rotary import find_ropes


@dataclass
class CaptureItem:
    """Tokens first .. end - 1 of one prompt lie in blocks, from token `start` on.

    starts, block_ids: by cache group.
    """

    doc: int
    heldout: bool
    keep: float
    first: int
    end: int
    starts: list[int]
    block_ids: list[list[int]]


@dataclass
class CaptureMetadata(KVConnectorMetadata):
    """Scheduler -> workers: what this step computed."""

    items: list[CaptureItem] = field(default_factory=list)
    close: bool = False


class KVTCCaptureConnector(KVConnectorBase_V1, SupportsHMA):
    """Stores nothing and loads nothing; see the module's docstring."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version(vllm_version())
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self._directory = Path(extra["spool"])
        self._seed = int(extra.get("seed", 0))
        self._sinks = int(extra.get("sink_tokens", 4))
        geometry = read_geometry(vllm_config, kv_cache_config, False)
        # States are not coded.
        self._groups, self._tp_size = geometry.coded_groups, geometry.tp_size
        self._geometry = geometry
        if any(is_fp8(group.dtype) for group in self._groups):
            raise UnsupportedError(
                "calibrating on an fp8 KV cache is refused, because its rounding would be fitted "
                "too; use kv_cache_dtype auto: the artifact serves fp8 caches as well"
            )
        self._tables = BlockTables(geometry.block_tables)
        self._requests: dict[str, Any] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is delivered."""
        return False

    # ------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Open the spools of this rank."""
        groups = self._groups
        self._layouts = paged_layouts(kv_caches, self._geometry)
        names = [name for group in groups for name in group.layer_names]
        live = LiveModel(self._vllm_config, names)
        rank = get_tensor_model_parallel_rank()
        self._writers = []
        for number, group in enumerate(groups):
            ropes, layer_rope = find_ropes(self._vllm_config, group.layer_names, live)
            header = SpoolHeader(
                geometry=codec_geometry(group),
                total_kv_heads=self._total_kv_heads(group),
                dtype=next(name for name, dtype in DTYPES.items() if dtype == group.dtype),
                layer_names=group.layer_names,
                layer_rope=layer_rope,
                rope_neox=tuple(rope.neox for rope in ropes),
                rank=rank,
                tp_size=self._tp_size,
                attention=str(group.reach),
                layers=tuple(map(layer_number, group.layer_names)),
            )
            directory = group_directory(self._directory, number) / f"rank{rank}"
            self._writers.append(SpoolWriter(directory, header, ropes))

    def _total_kv_heads(self, group: CacheGroup) -> int:
        """Of all ranks. The model's own number, but for layers that have another."""
        if group.latent:
            return 1
        tp_size = self._tp_size
        total = int(self._vllm_config.model_config.get_total_num_kv_heads())
        return (
            total
            if group.num_kv_heads == max(1, total // tp_size)
            else (group.num_kv_heads * tp_size)
        )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to load."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Rows span layers: captured after the forward."""

    def wait_for_save(self) -> None:
        """Copy the sampled tokens of this step into the spool."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, CaptureMetadata)
        for item in metadata.items:
            positions = self._sample(item)
            if positions.numel():
                for number, writer in enumerate(self._writers):
                    k, v = self._layouts[number].gather(item.block_ids[number])
                    rows = (positions - item.starts[number]).to(k.device)
                    writer.append(k[rows], v[rows], positions, item.doc, item.heldout)
        if metadata.close:
            for writer in self._writers:
                writer.close()

    def _sample(self, item: CaptureItem) -> torch.Tensor:
        """Positions to keep: the same on every rank and however the prompt was cut into steps."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + item.doc)
        chosen = torch.rand(item.end, generator=generator) < item.keep
        chosen[: max(item.first, self._sinks)] = False
        return chosen.nonzero().flatten()

    # --------------------------------------------------------------- scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing is cached; remembers the request for its parameters."""
        self._requests[request.request_id] = request
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to load."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The prompt tokens that this step computes."""
        metadata = CaptureMetadata()
        groups = self._groups
        for request_id, progress in self._tables.update(scheduler_output).items():
            request = self._requests[request_id]
            params = request.kv_transfer_params or {}
            metadata.close |= bool(params.get("kvtc_close"))
            end = min(progress.computed + progress.scheduled, request.num_prompt_tokens)
            if "kvtc_doc" not in params or end <= progress.computed:
                continue
            # A window's blocks of this step are all there, whatever it has left behind.
            firsts = [progress.computed // group.block_size for group in groups]
            tables = self._tables.ids[request_id]
            metadata.items.append(
                CaptureItem(
                    doc=int(params["kvtc_doc"]),
                    heldout=bool(params["kvtc_heldout"]),
                    keep=float(params["kvtc_keep"]),
                    first=progress.computed,
                    end=end,
                    starts=[
                        first * group.block_size
                        for first, group in zip(firsts, groups, strict=True)
                    ],
                    block_ids=[
                        group.blocks(tables, first, -(-end // group.block_size))
                        for first, group in zip(firsts, groups, strict=True)
                    ],
                )
            )
        for request_id in scheduler_output.finished_req_ids:
            self._tables.forget(request_id)
            self._requests.pop(request_id, None)
        return metadata

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once."""
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks are free at once."""
        return False, None
