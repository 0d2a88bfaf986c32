"""The connector's configuration: one struct, read from `kv_connector_extra_config`.

Presets are YAML files in `configs/` whose keys are fields of this struct; a
`preset` key in the extra config is expanded first, then the other keys given
override it. Every unknown key, wrong type and contradiction is an error that
names the key, the value and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

CONNECTOR_NAME = "KVTCConnector"
DEFAULT_RATIO = 16.0
DEFAULT_RECENT_WINDOW = 128
AUTO = "auto"

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*$", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class ConfigError(ValueError):
    """A configuration key has a value that can't be used."""


class KVTCConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Validated configuration.

    codec: "kvtc" or "raw" (uncompressed, bit-exact).
    ratio: target compression ratio before DEFLATE; must be a plan of the artifact.
    artifact: directory of one calibration artifact, instead of a registry lookup.
    registry: directories searched before the user's and the shipped registry.
    memory_bytes: capacity of the CPU-memory tier in real bytes, all ranks
        together; an integer or a string such as "8GiB".
    eviction: order in which the tier gives chunks up.
    chunk_tokens: tokens a chunk; a multiple of vLLM's block size.
    recent_window: tokens before the end of a prompt that are always computed,
        never served from the codec.
    staging_bytes: uncompressed KV that may wait for encoding on one rank;
        beyond it stores are dropped and counted. "auto": what two full steps of the engine
        compute, at least 256 MiB, on a GPU at most a quarter of its free memory.
    kernels: on a GPU, encode and decode in batches by Triton kernels and nvCOMP; else, and
        where they fail at start-up, chunk by chunk by torch operations and isal.
    encode_threads, load_threads: worker threads a rank, each on one CPU core.
    encode_share: of the machine's CPU time that encoding may take while the engine
        computes, 1 for no limit; an idle engine encodes at full speed. No limit on a GPU.
    deflate_level: 0 to 3, isal's scale.
    store_decode: also store blocks filled while generating.
    store_threshold: store a chunk once this many requests have contained it.
    load_gate: offer a load only where it is measured to be faster than recomputing.
    disk_path: directory of the disk tier below the memory tier; none by default.
    disk_bytes: capacity of that directory, whoever else uses it included.
    disk_min_free: bytes that stay free on its volume.
    disk_write: "through" also writes every stored chunk to disk, so that it survives a
        crash; "behind" writes what memory evicts, and the rest at a clean shutdown.
    disk_threads: threads for reading, and as many for writing, a rank.
    load_deadline: seconds a request waits for its chunks from disk; then it recomputes.
    self_test: round trip of the artifact's probe rows at start-up.
    """

    codec: Literal["kvtc", "raw"] = "kvtc"
    ratio: float | None = None
    artifact: str | None = None
    registry: tuple[str, ...] = ()
    memory_bytes: int | str = "4GiB"
    eviction: Literal["lru", "arc"] = "lru"
    chunk_tokens: int = 128
    recent_window: int | None = None
    staging_bytes: int | str = AUTO
    kernels: bool = True
    encode_threads: int = 1
    encode_share: float = 0.02
    load_threads: int = 2
    deflate_level: int = 1
    store_decode: bool = True
    store_threshold: int = 1
    load_gate: bool = True
    disk_path: str | None = None
    disk_bytes: int | str = "32GiB"
    disk_min_free: int | str = "4GiB"
    disk_write: Literal["through", "behind"] = "through"
    disk_threads: int = 2
    load_deadline: float = 2.0
    self_test: bool = True

    @property
    def target_ratio(self) -> float:
        """Ratio of the plan; 1.0 for the raw codec."""
        if self.codec == "raw":
            return 1.0
        return self.ratio if self.ratio is not None else DEFAULT_RATIO

    @property
    def window(self) -> int:
        """Recent window in tokens: 128 for a lossy codec, 0 for raw, unless set."""
        if self.recent_window is not None:
            return self.recent_window
        return 0 if self.codec == "raw" else DEFAULT_RECENT_WINDOW

    @property
    def memory_capacity(self) -> int:
        """Capacity of the memory tier in bytes, all ranks together."""
        return parse_bytes("memory_bytes", self.memory_bytes)

    @property
    def disk_capacity(self) -> int:
        """Capacity of the disk tier in bytes, all ranks and users of it together."""
        return parse_bytes("disk_bytes", self.disk_bytes)

    @property
    def disk_reserve(self) -> int:
        """Bytes to leave free on the disk tier's volume."""
        return parse_bytes("disk_min_free", self.disk_min_free)

    @property
    def staging_capacity(self) -> int | None:
        """Staging pool of one rank in bytes; None for automatic."""
        if self.staging_bytes == AUTO:
            return None
        return parse_bytes("staging_bytes", self.staging_bytes)


def parse_bytes(field: str, value: int | str) -> int:
    """Bytes from 1234, "8GiB", "500 MB". Raises ConfigError."""
    if isinstance(value, int):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ConfigError(f'{field}={value!r} is not a size; give bytes or a string such as "8GiB"')
    unit = (match.group(2) or "").lower()
    factor = _BINARY_UNITS.get(unit) or _UNITS[unit]
    return int(float(match.group(1)) * factor)


def load_config(extra: Mapping[str, Any]) -> KVTCConfig:
    """Build the configuration from `kv_connector_extra_config`. Raises ConfigError."""
    merged = _expand(extra)
    allowed = [f.name for f in msgspec.structs.fields(KVTCConfig)]
    for key in merged:
        if key not in allowed:
            raise ConfigError(
                f"unknown key {key!r} in kv_connector_extra_config; "
                f"allowed: preset, {', '.join(allowed)}"
            )
    try:
        config = msgspec.convert(merged, KVTCConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from None
    _check(config)
    return config


def _expand(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `preset` by its keys; the other keys given win. Raises ConfigError."""
    given = dict(extra)
    preset = given.pop("preset", None)
    return {**(load_preset(preset) if preset is not None else {}), **given}


def _check(config: KVTCConfig) -> None:
    if config.codec == "raw":
        for key in ("ratio", "artifact"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"{key}={getattr(config, key)!r} contradicts codec='raw', which stores KV "
                    f"uncompressed; remove {key} or set codec='kvtc'"
                )
    if config.ratio is not None and not config.ratio > 1:
        raise ConfigError(f"ratio={config.ratio} must be above 1, such as 8, 16 or 32")
    if config.artifact is not None and config.registry:
        raise ConfigError(
            "artifact and registry contradict each other: artifact names one directory, "
            "registry is where to look for one; remove either"
        )
    _require_range("chunk_tokens", config.chunk_tokens, 1, 4096)
    _require_range("recent_window", config.window, 0, 1 << 20)
    _require_range("encode_threads", config.encode_threads, 1, 64)
    _require_range("encode_share", config.encode_share, 0.001, 1)
    _require_range("load_threads", config.load_threads, 1, 64)
    _require_range("deflate_level", config.deflate_level, 0, 3)
    _require_range("store_threshold", config.store_threshold, 1, 1 << 16)
    _require_range("disk_bytes", config.disk_capacity, 1 << 20, 1 << 50)
    _require_range("disk_min_free", config.disk_reserve, 0, 1 << 50)
    _require_range("disk_threads", config.disk_threads, 1, 64)
    _require_range("load_deadline", config.load_deadline, 0.01, 600)
    _require_range("memory_bytes", config.memory_capacity, 1, 1 << 50)
    if config.staging_capacity is not None:
        _require_range("staging_bytes", config.staging_capacity, 1, 1 << 50)


def _require_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{field}={value} is out of range; give {low} to {high}")


def preset_directory() -> Path:
    """Directory of the shipped presets: in the wheel, else in the source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names of the connector's shipped presets, sorted; LMCache's are not among them."""
    names = (p.stem for p in preset_directory().glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("lmcache-"))


def load_preset(name: object) -> dict[str, Any]:
    """Keys of one preset without its `description`. Raises ConfigError."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"preset={name!r} is not known; allowed: {', '.join(names)}")
    content = _read_preset(str(name))
    content.pop("description", None)
    return content


def preset_description(name: str) -> str:
    """What a shipped preset says of itself."""
    return str(_read_preset(name).get("description", ""))


def _read_preset(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((preset_directory() / f"{name}.yaml").read_text()))


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
