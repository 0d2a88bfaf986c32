"""What LMCache is started with: JSON of adapters, and whole commands. Imports no LMCache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from kvtc_vllm.config import ConfigError, preset_directory
from kvtc_vllm.lmcache.settings import LMCacheSettings, load_settings

PREFIX = "lmcache-"
SERVER_KEYS = ("host", "port", "http-port", "chunk-size", "l1-size-gb", "eviction-policy")
"""Options of `lmcache server` that may be given as KEY=VALUE, with "server." before them."""
OUTER_KEYS = ("affinity_tag", "eviction", "persist", "shared")
"""Keys of an adapter's JSON that LMCache reads before the adapter does."""
ROUTES = ("server-module", "plugin")
DEFAULT_PORT = 5555


def lmcache_presets() -> dict[str, str]:
    """Name, without the prefix, and description of every preset."""
    paths = sorted(preset_directory().glob(f"{PREFIX}*.yaml"))
    return {
        path.stem.removeprefix(PREFIX): str(yaml.safe_load(path.read_text())["description"])
        for path in paths
    }


def commands(preset: str, overrides: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Words of the server's command and of vLLM's.

    overrides: settings of `LMCacheSettings` by name; "server.KEY" for the server; "l2.KEY" for the
    L2 adapter; "route". Raises ConfigError.
    """
    if preset not in lmcache_presets():
        raise ConfigError(f"{preset!r} is not known; allowed: {', '.join(lmcache_presets())}")
    content = yaml.safe_load((preset_directory() / f"{PREFIX}{preset}.yaml").read_text())
    server = {"port": DEFAULT_PORT, "eviction-policy": "LRU", **content["server"]}
    kvtc, adapter = dict(content["kvtc"]), dict(content["l2_adapter"])
    route = ROUTES[0]
    settings = [field.name for field in msgspec.structs.fields(LMCacheSettings)]
    for key, value in overrides.items():
        part, _, name = key.rpartition(".")
        if part == "server" and name in SERVER_KEYS:
            server[name] = value
        elif part == "l2":
            adapter[name] = value
        elif key == "route" and value in ROUTES:
            route = value
        elif key in settings:
            kvtc[key] = value
        else:
            raise ConfigError(
                f"{key}={value!r} is not known; give model=..., other settings "
                f"({', '.join(settings)}), l2.KEY, server.KEY ({', '.join(SERVER_KEYS)}) or "
                f"route={'|'.join(ROUTES)}"
            )
    model = load_settings(kvtc).model
    words = ["lmcache", "server", *(w for k, v in server.items() for w in (f"--{k}", str(v)))]
    if kvtc.get("page_order") == "cpu":
        words += ["--supported-transfer-mode", "auto"]
    if route == "plugin":
        words += ["--l2-adapter", json.dumps(adapter_spec(adapter, kvtc))]
    else:
        config = {"kvtc": kvtc, "l2_adapters": [adapter]}
        module = {"module_path": "kvtc_vllm.lmcache.server_module", "config": config}
        words += ["--server-module", json.dumps(module)]
    return words, ["vllm", "serve", model, "--kv-transfer-config", json.dumps(_transfer(server))]


def _transfer(server: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": f"tcp://{server.get('host', 'localhost')}",
            "lmcache.mp.port": server["port"],
        },
    }


def adapter_spec(inner: Mapping[str, Any], kvtc: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin adapter around `inner`, with the serde; both get the settings `kvtc`.

    inner: JSON of a built-in adapter, as one would give it to LMCache without KVTC.
    """
    return {
        "type": "plugin",
        "module_path": "kvtc_vllm.lmcache.adapter",
        "class_name": "KvtcSizedL2Adapter",
        "adapter_params": {
            "inner": {key: value for key, value in inner.items() if key not in OUTER_KEYS},
            "kvtc": dict(kvtc),
        },
        "serde": {"type": "kvtc", **kvtc},
        **{key: inner[key] for key in OUTER_KEYS if key in inner},
    }
