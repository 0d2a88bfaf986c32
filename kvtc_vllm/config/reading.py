"""`kv_connector_extra_config` -> `KVTCConfig`, or one sentence that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtc_vllm.config.contradictions import check_contradictions
from kvtc_vllm.config.keys import (
    ConfigKey,
    allowed_values,
    convert_keys,
    describe_keys,
    field_extra,
    key_fields,
)
from kvtc_vllm.config.presets import load_preset, preset_names
from kvtc_vllm.config.settings import KVTCConfig
from kvtc_vllm.config.values import ConfigError, check_path, parse_bytes, shown

CONNECTOR_NAME = "KVTCConnector"


def describe() -> list[ConfigKey]:
    """Every key of `kv_connector_extra_config`, in the order of the fields."""
    preset = ConfigKey(
        "preset", "none", ", ".join(preset_names()), "Sets the keys of a file of `configs/`."
    )
    return [preset, *describe_keys(KVTCConfig)]


def load_config(extra: Mapping[str, Any]) -> KVTCConfig:
    """Build the configuration from `kv_connector_extra_config`. Raises ConfigError."""
    place = "kv_connector_extra_config"
    config = convert_keys(KVTCConfig, _expand(extra), place, also=("preset",))
    _check_sizes(config)
    check_contradictions(config)
    if config.artifact is not None:
        check_path("artifact", config.artifact)
    for place in config.registry:
        check_path("registry", place)
    if config.disk_path is not None:
        check_path("disk_path", config.disk_path, absolute=True)
    return config


def _expand(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `preset` by its keys; the other keys given win. Raises ConfigError."""
    if not isinstance(extra, Mapping):
        raise ConfigError(
            f"kv_connector_extra_config={shown(extra)} is not an object of keys and values; "
            'give one such as {"preset": "kvtc-16x"}'
        )
    given = dict(extra)
    preset = given.pop("preset", None)
    keys = load_preset(preset) if preset is not None else {}
    if given.get("quality") is not None:
        # What a preset says of the ratio is then not meant.
        keys = {key: value for key, value in keys.items() if key != "ratio"}
    return {**keys, **given}


def _check_sizes(config: KVTCConfig) -> None:
    for name, field in key_fields(KVTCConfig).items():
        extra = field_extra(field)
        value = getattr(config, name)
        if "size" not in extra or value == extra.get("word"):
            continue
        low, high = extra["size"]
        if not low <= parse_bytes(name, value) <= high:
            raise ConfigError(
                f"{name}={shown(value)} is out of range; give {allowed_values(field)}"
            )


def kv_transfer_config(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary for `vllm serve --kv-transfer-config`, presets expanded.

    Raises ConfigError when `extra` isn't valid.
    """
    load_config(extra)
    return {
        "kv_connector": CONNECTOR_NAME,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": _expand(extra),
    }
