"""Start-up of one worker: RoPE, artifact, codec, self-test, one line in the log."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.codec import ChunkCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.geometry import CacheGeometry
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.worker import KVTCWorker

logger = init_logger("vllm.kvtc")


def build_worker(
    vllm_config: Any,
    config: KVTCConfig,
    geometry: CacheGeometry,
    kv_caches: dict[str, torch.Tensor],
) -> KVTCWorker:
    """Everything a rank needs before its first step."""
    rank = get_tensor_model_parallel_rank()
    layout = PagedLayout(kv_caches, geometry)
    codec: ChunkCodec
    plain = Geometry(
        num_layers=len(geometry.layer_names),
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        head_size_v=geometry.head_size_v,
        layer_groups=((0, len(geometry.layer_names)),),
    )
    codec = RawCodec(plain, geometry.dtype, device=layout.device)
    return KVTCWorker(config, geometry, layout, codec, rank)
