"""Keys of the configuration that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_vllm.config.values import ConfigError

if TYPE_CHECKING:
    from kvtc_vllm.config.settings import KVTCConfig


def check_contradictions(config: KVTCConfig) -> None:
    """Raises ConfigError that names the keys, their values, and what to change."""
    if config.ratio is not None and config.quality is not None:
        raise ConfigError(
            f"ratio={config.ratio!r} and quality={config.quality!r} contradict each other: quality "
            "is what the ratio is chosen by; remove either"
        )
    if config.codec == "raw":
        for key in ("ratio", "quality", "artifact"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"{key}={getattr(config, key)!r} contradicts codec='raw', which stores KV "
                    f"uncompressed; remove {key} or set codec='kvtc'"
                )
    if config.joint == "delta" and config.codec != "kvtc2":
        raise ConfigError(
            f"joint='delta' contradicts codec={config.codec!r}: only chunks of codec 2 can be kept "
            "as differences; set codec='kvtc2', or joint='exact' or 'off'"
        )
    if config.joint == "delta" and config.disk_path is not None and config.disk_write == "behind":
        raise ConfigError(
            "joint='delta' contradicts disk_write='behind', which writes evicted chunks within a "
            "step, and making them whole takes too long there; set disk_write='through'"
        )
    if config.exclusive and config.store_policy == "eager":
        raise ConfigError(
            "exclusive=True contradicts store_policy='eager', which does not watch what the engine "
            "evicts; remove exclusive or set store_policy='on_evict'"
        )
    if config.artifact is not None and config.registry:
        raise ConfigError(
            "artifact and registry contradict each other: artifact names one directory, "
            "registry is where to look for one; remove either"
        )
