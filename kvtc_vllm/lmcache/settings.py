"""Configuration of KVTC inside an LMCache server, as it comes out of its JSON.

A field's annotation holds its limits and its description; `kvtc config lmcache --describe` shows
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvtc_vllm.config import DEFAULT_RATIO, ConfigError
from kvtc_vllm.config.keys import PathText, Threads, convert_keys

ModelName = Annotated[str, Meta(title="a name")]


class LMCacheSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model whose chunks are coded; made by `load_settings`."""

    model: Annotated[
        str, Meta(title="a directory or hub id", description="The model that vLLM serves.")
    ]
    model_names: Annotated[
        tuple[ModelName, ...],
        Meta(description="Names under which its chunks arrive, other than `model`."),
    ] = ()
    artifact: Annotated[
        PathText | None,
        Meta(description="Directory of one artifact, instead of a search in registries."),
    ] = None
    registry: Annotated[
        tuple[PathText, ...],
        Meta(
            description="Registries to search before the user's and the shipped one: "
            "directories, or `hf:ORG/REPO@COMMIT`."
        ),
    ] = ()
    ratio: Annotated[
        float,
        Meta(
            ge=1,
            le=1024,
            description="Target ratio before DEFLATE. The artifact must have a plan for it.",
        ),
    ] = DEFAULT_RATIO
    deflate_level: Annotated[
        int, Meta(ge=0, le=3, description="Effort of DEFLATE, on isal's scale.")
    ] = 1
    pipeline_ranks: Annotated[
        int, Meta(ge=1, le=255, description="Pipeline-parallel size of the engines.")
    ] = 1
    page_order: Annotated[
        Literal["packed", "cpu"],
        Meta(
            description="Order of the bytes inside a chunk. `packed` is [K, V] per token and head, "
            "as on a GPU. `cpu` is that of vLLM's CPU backend; the server must then be able to "
            "import vLLM."
        ),
    ] = "packed"
    block_size: Annotated[
        Annotated[int, Meta(ge=1, le=1 << 16)] | None,
        Meta(description="vLLM's block size in tokens; with `page_order: cpu`, and only then."),
    ] = None
    position_wait: Annotated[
        float,
        Meta(
            ge=0, le=60, description="Seconds to wait for the event that says where a chunk starts."
        ),
    ] = 0.5
    fallback: Annotated[
        Literal["raw", "drop"],
        Meta(
            description="What becomes of a chunk that can't be coded: `raw` keeps it uncompressed, "
            "`drop` does not store it."
        ),
    ] = "raw"
    max_workers: Annotated[Threads, Meta(description="Threads that code.")] = 2

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every model name whose chunks are ours."""
        return (self.model, *self.model_names)


def load_settings(values: Mapping[str, Any]) -> LMCacheSettings:
    """Check the JSON object. Raises ConfigError, naming the key."""
    settings = convert_keys(LMCacheSettings, values, "KVTC's settings for LMCache")
    if (settings.page_order == "cpu") != (settings.block_size is not None):
        raise ConfigError(
            f"page_order={settings.page_order!r} and block_size={settings.block_size} do not fit: "
            'give block_size with page_order "cpu", and only then'
        )
    return settings
