"""The adapter that the sized one stores in."""

from __future__ import annotations

from typing import Any

from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class

from kvtc_vllm.config import ConfigError
from kvtc_vllm.lmcache.counters import logger
from kvtc_vllm.lmcache.spec import OUTER_KEYS

PROVEN = ("fs", "fs_native", "mock", "resp", "s3")
"""Adapters with which this one is tested."""
REFUSED = {
    **dict.fromkeys(
        ("nixl_store", "nixl_store_dynamic", "nixl_native", "p2p", "dax"),
        "it moves whole buffers registered with its device",
    ),
    "plugin": "adapters of others are not wrapped",
}


def build_inner(values: dict[str, Any], l1_memory_desc: Any) -> L2AdapterInterface:
    """Make the inner adapter from its JSON. Raises ConfigError."""
    kind = values.get("type")
    if kind in REFUSED:
        raise ConfigError(f"KVTC does not store in {kind!r}: {REFUSED[kind]}")
    if values.get("use_odirect"):
        raise ConfigError("use_odirect does not fit KVTC, whose blobs are of any length")
    outer = [key for key in (*OUTER_KEYS, "serde") if key in values]
    if outer:
        raise ConfigError(f"{outer} belong beside the inner adapter, not into it")
    if kind not in PROVEN:
        logger.warning("kvtc: storing in %r has not been tested; tested are %s", kind, PROVEN)
    try:
        config = get_l2_adapter_config_class(kind).from_dict(dict(values))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"inner L2 adapter {kind!r}: {error}") from error
    return create_l2_adapter(config, l1_memory_desc)
