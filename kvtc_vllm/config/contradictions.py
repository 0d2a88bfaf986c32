"""Keys of the configuration that do not go together."""

from __future__ import annotations

from kvtc_vllm.config.settings import KVTCConfig
from kvtc_vllm.config.values import ConfigError, shown

_OF_DISK = ("disk_bytes", "disk_min_free", "disk_write", "disk_threads")
"""Keys that nothing but the disk tier reads."""
_DEFAULTS = KVTCConfig()


def check_contradictions(config: KVTCConfig) -> None:
    """Raise ConfigError for the first pair that contradicts."""
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
    _check_degrade(config)
    if config.exclusive and config.store_policy == "eager":
        raise ConfigError(
            "exclusive=True contradicts store_policy='eager', which does not watch what the engine "
            "evicts; remove exclusive or set store_policy='on_evict'"
        )
    _check_disk(config)
    if config.artifact is not None and config.registry:
        raise ConfigError(
            "artifact and registry contradict each other: artifact names one directory, "
            "registry is where to look for one; remove either"
        )


def _check_disk(config: KVTCConfig) -> None:
    """Who says something of the disk tier wants one."""
    if config.disk_path is not None:
        return
    for key in _OF_DISK:
        value = getattr(config, key)
        if value != getattr(_DEFAULTS, key):
            raise ConfigError(
                f"{key}={shown(value)} says nothing without a disk tier, and disk_path is not set; "
                f"set it, or remove {key}"
            )


def _check_degrade(config: KVTCConfig) -> None:
    if config.degrade_floor is not None and config.degrade == "off":
        raise ConfigError(
            f"degrade_floor={config.degrade_floor!r} contradicts degrade='off', which halves "
            "nothing; remove degrade_floor or set degrade='memory'"
        )
    if config.degrade == "off":
        return
    if config.codec != "kvtc2":
        raise ConfigError(
            f"degrade={config.degrade!r} contradicts codec={config.codec!r}: only chunks of codec "
            "2 can be halved; set codec='kvtc2' or degrade='off'"
        )
    if config.joint in ("exact", "delta"):
        raise ConfigError(
            f"degrade={config.degrade!r} contradicts joint={config.joint!r}, in which chunks share "
            "bytes; set either to 'off'"
        )
    if config.degrade == "both" and config.disk_path is None:
        raise ConfigError(
            "degrade='both' needs a disk tier, and disk_path is not set; set it, or set "
            "degrade='memory'"
        )
    floor, known = config.degrade_floor, config.quality is None
    if known and floor is not None and floor <= config.target_ratio:
        raise ConfigError(
            f"degrade_floor={floor!r} is not above ratio={config.target_ratio!r}, "
            "at which chunks are stored; give a higher one"
        )
