"""The configuration's keys: limits, meanings, contradictions.

A field's annotation holds its limits and its description. The checks, the error
messages and the table of `kvtc config --describe` all read them there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from kvtc_vllm.config.presets import load_preset, preset_names
from kvtc_vllm.config.values import ConfigError, parse_bytes, shown, size_text

CONNECTOR_NAME = "KVTCConnector"
DEFAULT_RATIO = 16.0
DEFAULT_RECENT_WINDOW = 128
AUTO = "auto"

_MIB = 1 << 20
_MOST_BYTES = 1 << 50

Ratio = Annotated[float, Meta(gt=1, le=1024)]
Threads = Annotated[int, Meta(ge=1, le=64)]
Window = Annotated[int, Meta(ge=0, le=1 << 20)]
PathText = Annotated[str, Meta(title="a path")]
Size = int | str
"""Bytes, or a string such as "8GiB". The field's Meta has its limits under `size`."""


class KVTCConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Validated configuration; made by `load_config`."""

    codec: Annotated[
        Literal["kvtc", "raw"],
        Meta(description="`raw` stores KV uncompressed and bit-exact, to compare with."),
    ] = "kvtc"
    ratio: Annotated[
        Ratio | None,
        Meta(
            description="Target ratio before DEFLATE. The artifact must have a plan for it.",
            extra={"default": f"{DEFAULT_RATIO:g}"},
        ),
    ] = None
    artifact: Annotated[
        PathText | None,
        Meta(description="Directory of one artifact, instead of a search in registries."),
    ] = None
    registry: Annotated[
        tuple[PathText, ...],
        Meta(description="Registries to search before the user's and the shipped one."),
    ] = ()
    memory_bytes: Annotated[
        Size,
        Meta(
            description="Budget of the memory tier in real bytes, all ranks together.",
            extra={"size": (1, _MOST_BYTES)},
        ),
    ] = "4GiB"
    eviction: Annotated[
        Literal["lru", "arc"],
        Meta(description="Order in which a tier evicts chunks."),
    ] = "lru"
    chunk_tokens: Annotated[
        int,
        Meta(ge=1, le=4096, description="Tokens per chunk; a multiple of vLLM's block size."),
    ] = 128
    recent_window: Annotated[
        Window | None,
        Meta(
            description="Tokens before the end of a prompt that are always computed, never loaded.",
            extra={"default": f"{DEFAULT_RECENT_WINDOW}; `raw`: 0"},
        ),
    ] = None
    staging_bytes: Annotated[
        Size,
        Meta(
            description="Uncompressed KV that may wait for the encoder, per rank. Beyond it, "
            "stores are dropped and counted. `auto`: two full steps of the engine, at least "
            "256 MiB; on a GPU at most a quarter of what is free.",
            extra={"size": (1, _MOST_BYTES), "word": AUTO},
        ),
    ] = AUTO
    kernels: Annotated[
        bool,
        Meta(
            description="On a GPU, encode and decode in batches with Triton kernels and nvCOMP. "
            "Without it, or if the self-test of the kernels fails, torch operations and isal "
            "do the work."
        ),
    ] = True
    encode_threads: Annotated[Threads, Meta(description="Threads that encode, per rank.")] = 1
    encode_share: Annotated[
        float,
        Meta(
            ge=0.001,
            le=1,
            description="Share of the machine's CPU time that encoding may take while the engine "
            "computes. An idle engine encodes at full speed. There is no limit on a GPU.",
        ),
    ] = 0.02
    load_threads: Annotated[Threads, Meta(description="Threads that decode, per rank.")] = 2
    deflate_level: Annotated[
        int, Meta(ge=0, le=3, description="Effort of DEFLATE, on isal's scale.")
    ] = 1
    store_decode: Annotated[
        bool,
        Meta(description="Also store blocks filled while generating. Multi-turn chat needs it."),
    ] = True
    store_threshold: Annotated[
        int,
        Meta(ge=1, le=1 << 16, description="Requests that must contain a chunk before it is kept."),
    ] = 1
    load_gate: Annotated[
        bool,
        Meta(description="Load only where this engine measures it to be faster than recomputing."),
    ] = True
    disk_path: Annotated[
        PathText | None,
        Meta(
            description="Directory of the disk tier, absolute or from `~`. It survives restarts "
            "and crashes. Without it there is no disk tier."
        ),
    ] = None
    disk_bytes: Annotated[
        Size,
        Meta(
            description="Capacity of that directory, for all engines that share it.",
            extra={"size": (_MIB, _MOST_BYTES)},
        ),
    ] = "32GiB"
    disk_min_free: Annotated[
        Size,
        Meta(
            description="Bytes that stay free on its volume.",
            extra={"size": (0, _MOST_BYTES)},
        ),
    ] = "4GiB"
    disk_write: Annotated[
        Literal["through", "behind"],
        Meta(
            description="`through` also writes every stored chunk to disk. `behind` writes what "
            "memory evicts, and the rest at a clean shutdown."
        ),
    ] = "through"
    disk_threads: Annotated[
        Threads, Meta(description="Threads that read, and as many that write, per rank.")
    ] = 2
    load_deadline: Annotated[
        float,
        Meta(
            ge=0.01,
            le=600,
            description="Seconds that a request waits for chunks from disk; then it recomputes.",
        ),
    ] = 2.0
    self_test: Annotated[
        bool, Meta(description="At start-up, round trip of the artifact's probe rows.")
    ] = True

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


class ConfigKey(NamedTuple):
    """One row of the table of keys, as text."""

    name: str
    default: str
    values: str
    meaning: str


def describe() -> list[ConfigKey]:
    """Every key of `kv_connector_extra_config`, in the order of the fields."""
    preset = ConfigKey(
        "preset", "none", ", ".join(preset_names()), "Sets the keys of a file of `configs/`."
    )
    return [preset, *(_describe(field) for field in _fields().values())]


def _describe(field: msgspec.inspect.Field) -> ConfigKey:
    assert isinstance(field.type, msgspec.inspect.Metadata)
    meaning = (field.type.extra_json_schema or {})["description"]
    default = (field.type.extra or {}).get("default", _default(field.default))
    return ConfigKey(field.name, default, _values(field), meaning)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def _values(field: msgspec.inspect.Field) -> str:
    """What a key may be set to: "1 to 64", "lru, arc"."""
    assert isinstance(field.type, msgspec.inspect.Metadata)
    extra = field.type.extra or {}
    if "size" not in extra:
        return _values_of(field.type)
    low, high = (size_text(size) for size in extra["size"])
    word = f"{extra['word']}, or " if "word" in extra else ""
    return f"{word}{low} to {high}"


def _values_of(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.Metadata():
            title = (kind.extra_json_schema or {}).get("title")
            return str(title) if title else _values_of(kind.type)
        case msgspec.inspect.UnionType():
            optional = (t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType))
            return _values_of(next(optional))
        case msgspec.inspect.VarTupleType():
            return "a list of paths"
        case msgspec.inspect.LiteralType():
            return ", ".join(str(value) for value in kind.values)
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            low = f"{kind.ge:g}" if kind.ge is not None else f"above {kind.gt:g},"
            return f"{low} to {kind.le}"
        case _:
            return "true, false"


@cache
def _fields() -> dict[str, msgspec.inspect.Field]:
    kind = msgspec.inspect.type_info(KVTCConfig)
    assert isinstance(kind, msgspec.inspect.StructType)
    return {field.name: field for field in kind.fields}


def load_config(extra: Mapping[str, Any]) -> KVTCConfig:
    """Build the configuration from `kv_connector_extra_config`. Raises ConfigError."""
    merged = _expand(extra)
    types = {field.name: field.type for field in msgspec.structs.fields(KVTCConfig)}
    values = {}
    for key, value in merged.items():
        if key not in types:
            raise ConfigError(
                f"unknown key {shown(key)} in kv_connector_extra_config; "
                f"allowed: preset, {', '.join(types)}"
            )
        try:
            values[key] = msgspec.convert(value, types[key])
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"{key}={shown(value)} can't be used ({error}); give {_values(_fields()[key])}"
            ) from None
    config = KVTCConfig(**values)
    _check_sizes(config)
    _check_contradictions(config)
    if config.disk_path is not None:
        _check_disk_path(config.disk_path)
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
    return {**(load_preset(preset) if preset is not None else {}), **given}


def _check_sizes(config: KVTCConfig) -> None:
    for name, field in _fields().items():
        assert isinstance(field.type, msgspec.inspect.Metadata)
        extra = field.type.extra or {}
        value = getattr(config, name)
        if "size" not in extra or value == extra.get("word"):
            continue
        low, high = extra["size"]
        if not low <= parse_bytes(name, value) <= high:
            raise ConfigError(f"{name}={shown(value)} is out of range; give {_values(field)}")


def _check_contradictions(config: KVTCConfig) -> None:
    if config.codec == "raw":
        for key in ("ratio", "artifact"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"{key}={getattr(config, key)!r} contradicts codec='raw', which stores KV "
                    f"uncompressed; remove {key} or set codec='kvtc'"
                )
    if config.artifact is not None and config.registry:
        raise ConfigError(
            "artifact and registry contradict each other: artifact names one directory, "
            "registry is where to look for one; remove either"
        )


def _check_disk_path(text: str) -> None:
    """Raise ConfigError for what is no path, or another one in another working directory."""
    if "\0" in text:
        raise ConfigError(f"disk_path={shown(text)} has a NUL character, which no path may have")
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
    except UnicodeEncodeError:
        raise ConfigError(
            f"disk_path={shown(text)} has characters that no file name here may have"
        ) from None
    except RuntimeError:
        raise ConfigError(
            f"disk_path={shown(text)}: the home directory is not known; give an absolute path"
        ) from None
    if not path.is_absolute():
        raise ConfigError(
            f"disk_path={shown(text)} is not absolute; give a path such as /var/cache/kvtc"
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
