"""An extension of vLLM's workers; where it is named, rank 1 computes with other weights.

Behind vLLM's back, before the connector sees the model: as a trainer that writes into the
parameters, or a fault of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from kvtc_vllm.connector.connector import KVTCConnector
from kvtc_vllm.vllm_cache.live_model import LiveModel

_register = KVTCConnector.register_kv_caches


class Extension:
    """Nothing but a reason for a worker to import this module."""


def _register_other_weights(connector: KVTCConnector, kv_caches: dict[str, Any]) -> None:
    if get_tensor_model_parallel_rank() == 1:
        with torch.no_grad():
            for root in LiveModel(connector._vllm_config, list(kv_caches)).roots():
                for name, parameter in root.named_parameters():
                    # On a CPU other weights are packed by now, and these are in all layers.
                    if name.endswith("input_layernorm.weight"):
                        parameter.mul_(1.5)
    _register(connector, kv_caches)


KVTCConnector.register_kv_caches = _register_other_weights  # type: ignore[method-assign]
