"""`lmcache server --server-module`: the serde, positions from events, and the L2 adapters.

{"module_path": "kvtc_vllm.lmcache.server_module",
 "config": {"kvtc": {"model": ..., "ratio": 16},
            "l2_adapters": [{"type": "fs", "base_path": ...}]}}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.mp_observability.event import Event, EventType
from lmcache.v1.mp_observability.event_bus import get_event_bus
from lmcache.v1.multiprocess.ext_server_module import (
    ExtServerModuleBuildContext,
    server_module_handler,
)

from kvtc_vllm.config import ConfigError
from kvtc_vllm.lmcache.command import adapter_spec
from kvtc_vllm.lmcache.counters import export_counters, logger
from kvtc_vllm.lmcache.positions import BOOK
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.transcoder import Transcoder, transcoder


class KvtcModule:
    """What the server keeps of us: a status, and the handler "kvtc.stats"."""

    def __init__(self, context: Any, owner: Transcoder) -> None:
        self._context = context
        self._transcoder = owner

    @property
    def context(self) -> Any:
        """The server's context."""
        return self._context

    def report_status(self) -> dict[str, Any]:
        """Counters of this process."""
        return {"kvtc": self._transcoder.counters.snapshot()}

    def close(self) -> None:
        """Do nothing: the storage manager closes the adapters."""

    @server_module_handler("kvtc.stats")
    def stats(self, payload: bytes) -> bytes:
        """Counters as JSON; the payload is ignored."""
        return json.dumps(self._transcoder.counters.snapshot()).encode()


def build_server_modules(build: ExtServerModuleBuildContext) -> KvtcModule:
    """LMCache's entry point. The server does not start on ConfigError or ArtifactError."""
    unknown = set(build.config) - {"kvtc", "l2_adapters"}
    if unknown or not build.config.get("l2_adapters"):
        raise ConfigError(
            f'KVTC\'s server module is given {sorted(build.config)}; give "kvtc" and a list of '
            '"l2_adapters"'
        )
    owner = transcoder(load_settings(build.config["kvtc"]))
    bus = get_event_bus()
    bus.subscribe(EventType.MP_TOKENS, _learn_positions)
    for inner in build.config["l2_adapters"]:
        _attach(build.server_context.storage_manager, inner, build.config["kvtc"])
    export_counters(owner.counters)
    logger.info(
        "kvtc: %d L2 adapter(s), %d tokens per chunk, positions from %s",
        len(build.config["l2_adapters"]),
        build.server_context.chunk_size,
        "events" if bus.enabled else "the data (observability is disabled)",
    )
    return KvtcModule(build.server_context, owner)


def _attach(storage_manager: Any, inner: Mapping[str, Any], kvtc: Mapping[str, Any]) -> None:
    text = json.dumps(adapter_spec(inner, kvtc))
    parsed = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[text]))
    storage_manager.add_l2_adapter(parsed.adapters[0])


def _learn_positions(event: Event) -> None:
    """Note the positions of an event. Called on LMCache's event thread."""
    BOOK.learn(event.metadata["chunk_hashes"], event.metadata["token_offsets"])
