"""The connector's configuration: one struct, read from `kv_connector_extra_config`.

Presets are YAML files in `configs/` whose keys are fields of this struct; a
`preset` key in the extra config is expanded first, then the other keys given
override it. Every unknown key, wrong type and contradiction is an error that
names the key, the value and what would be right.
"""

from __future__ import annotations

from kvtc_vllm.config.keys import ConfigKey
from kvtc_vllm.config.presets import load_preset, preset_description, preset_directory, preset_names
from kvtc_vllm.config.reading import describe, kv_transfer_config, load_config
from kvtc_vllm.config.settings import DEFAULT_RATIO, DEFAULT_RECENT_WINDOW, KVTCConfig
from kvtc_vllm.config.values import ConfigError, parse_bytes

__all__ = [
    "DEFAULT_RATIO",
    "DEFAULT_RECENT_WINDOW",
    "ConfigError",
    "ConfigKey",
    "KVTCConfig",
    "describe",
    "kv_transfer_config",
    "load_config",
    "load_preset",
    "parse_bytes",
    "preset_description",
    "preset_directory",
    "preset_names",
]
