"""A struct whose fields are configuration keys: checked and described by their annotations.

A field's Meta has its limits and its description. A type's title says in words what a value is.
Meta's `extra` may have three more entries: `default`, the default in words; `size`, the limits
of a size in bytes; `word`, a word that may be given instead of a size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from kvtc_vllm.config.values import MOST_SHOWN, ConfigError, shown, size_text

T = TypeVar("T", bound=msgspec.Struct)

Threads = Annotated[int, Meta(ge=1, le=64)]
PathText = Annotated[str, Meta(title="a path")]


class ConfigKey(NamedTuple):
    """One row of a table of keys, as text."""

    name: str
    default: str
    values: str
    meaning: str


@cache
def key_fields(struct: type[msgspec.Struct]) -> dict[str, msgspec.inspect.Field]:
    """The struct's fields by name, in their order."""
    kind = msgspec.inspect.type_info(struct)
    assert isinstance(kind, msgspec.inspect.StructType)
    return {field.name: field for field in kind.fields}


def convert_keys(
    struct: type[T], values: Mapping[str, Any], place: str, also: Sequence[str] = ()
) -> T:
    """The struct with these values. place: what the keys are of, for errors.

    also: keys that the caller has taken out, which may be given too. Raises ConfigError for an
    unknown or missing key, and for a value of a wrong type or out of range.
    """
    types = {field.name: field.type for field in msgspec.structs.fields(struct)}
    fields = key_fields(struct)
    converted = {}
    for key, value in values.items():
        if key not in types:
            raise ConfigError(
                f"unknown key {shown(key)} in {place}; allowed: {', '.join((*also, *types))}"
            )
        try:
            converted[key] = msgspec.convert(value, types[key])
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            problem = str(error)[:MOST_SHOWN]
            raise ConfigError(
                f"{key}={shown(value)} can't be used ({problem}); "
                f"give {allowed_values(fields[key])}"
            ) from None
    for key, field in fields.items():
        if field.required and key not in converted:
            raise ConfigError(f"{key} is missing in {place}; give {allowed_values(field)}")
    return struct(**converted)


def describe_keys(struct: type[msgspec.Struct]) -> list[ConfigKey]:
    """A row per field, in the order of the fields. Every field must have a description."""
    return [_describe(field) for field in key_fields(struct).values()]


def field_extra(field: msgspec.inspect.Field) -> dict[str, Any]:
    """`extra` of the field's Meta."""
    assert isinstance(field.type, msgspec.inspect.Metadata)
    return field.type.extra or {}


def allowed_values(field: msgspec.inspect.Field) -> str:
    """What a key may be set to: "1 to 64", "lru, arc"."""
    extra = field_extra(field)
    if "size" not in extra:
        return _values_of(field.type)
    low, high = (size_text(size) for size in extra["size"])
    word = f"{extra['word']}, or " if "word" in extra else ""
    return f"{word}{low} to {high}"


def _describe(field: msgspec.inspect.Field) -> ConfigKey:
    assert isinstance(field.type, msgspec.inspect.Metadata)
    meaning = (field.type.extra_json_schema or {})["description"]
    default = "required" if field.required else _default(field.default)
    return ConfigKey(
        field.name, field_extra(field).get("default", default), allowed_values(field), meaning
    )


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def _values_of(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.Metadata():
            title = (kind.extra_json_schema or {}).get("title")
            return str(title) if title else _values_of(kind.type)
        case msgspec.inspect.UnionType():
            optional = (t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType))
            return _values_of(next(optional))
        case msgspec.inspect.VarTupleType():
            return f"a list of {_values_of(kind.item_type).removeprefix('a ')}s"
        case msgspec.inspect.LiteralType():
            return ", ".join(str(value) for value in kind.values)
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            low = f"{kind.ge:g}" if kind.ge is not None else f"above {kind.gt:g},"
            return f"{low} to {kind.le}"
        case _:
            return "true, false"
