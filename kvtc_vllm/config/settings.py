"""The configuration's keys: limits and meanings.

A field's annotation holds its limits and its description. The checks, the error
messages and the table of `kvtc config --describe` all read them there.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvtc_vllm.config.keys import PathText, Threads
from kvtc_vllm.config.values import parse_bytes

DEFAULT_RATIO = 16.0
DEFAULT_RECENT_WINDOW = 128
AUTO = "auto"

_MIB = 1 << 20
_MOST_BYTES = 1 << 50

Ratio = Annotated[float, Meta(gt=1, le=1024)]
Quality = Annotated[float, Meta(gt=0, le=100)]
Window = Annotated[int, Meta(ge=0, le=1 << 20)]
Size = int | str
"""Bytes, or a string such as "8GiB". The field's Meta has its limits under `size`."""


class KVTCConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Validated configuration; made by `load_config`."""

    codec: Annotated[
        Literal["kvtc", "kvtc2", "raw"],
        Meta(
            description="`kvtc2` is codec 2, which has artifacts of its own. `raw` stores KV "
            "uncompressed and bit-exact, to compare with."
        ),
    ] = "kvtc"
    ratio: Annotated[
        Ratio | None,
        Meta(
            description="Target ratio before DEFLATE, with `kvtc2` of all bytes. The artifact must "
            "have a plan for it.",
            extra={"default": f"{DEFAULT_RATIO:g}"},
        ),
    ] = None
    quality: Annotated[
        Quality | None,
        Meta(
            description="Instead of `ratio`: the highest ratio of the artifact whose KL, measured "
            "on held-out documents at calibration, is at most this, in nats per token. The "
            "artifact must have a measured curve (`kvtc calibrate --quality-curve`)."
        ),
    ] = None
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
    joint: Annotated[
        Literal["auto", "off", "exact", "delta"],
        Meta(
            description="Within one `cache_salt`. `exact`: equal bodies of chunks with other names "
            "are kept once, in memory and on disk. `delta`, with `kvtc2`: in memory, a chunk whose "
            "text another has, at any place, is kept as what it adds to that one. `auto`: `delta` "
            "where it can be, on a CPU, else `off`."
        ),
    ] = "auto"
    degrade: Annotated[
        Literal["off", "memory", "both"],
        Meta(
            description="With `kvtc2` on a CPU: before `memory`, or `both` tiers, evict chunks, "
            "they halve the bytes of cold ones, at a cost in quality. The artifact must have "
            "nested plans (`kvtc calibrate --halvings`)."
        ),
    ] = "off"
    degrade_floor: Annotated[
        Ratio | None,
        Meta(
            description="With `degrade`: the highest ratio that halving may lead to.",
            extra={"default": "the artifact's last"},
        ),
    ] = None
    latent_copies: Annotated[
        Literal["auto", "one", "each"],
        Meta(
            description="Of latents (MLA), which all tensor-parallel ranks have alike. `one`: the "
            "first rank keeps them for all, in memory that the others read, and on disk. `each`: "
            "every rank keeps all of them. `auto`: `one` where it can be."
        ),
    ] = "auto"
    chunk_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=4096,
            description="Tokens per chunk; a multiple of vLLM's block size. Where it is not given, "
            "it is rounded up to one, as models with recurrent layers need.",
        ),
    ] = 128
    state_codec: Annotated[
        Literal["exact", "bf16"],
        Meta(
            description="How states of recurrent layers are kept: bit for bit, or float32 ones "
            "rounded to bfloat16, at half the bytes."
        ),
    ] = "exact"
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
    store_policy: Annotated[
        Literal["eager", "on_evict", "auto"] | None,
        Meta(
            description="When a chunk is stored. `eager`: when it is complete. `on_evict`: when "
            "the engine's own cache is about to give it up. `auto`: the first while memory has "
            "room and the encoder keeps up, else the second.",
            extra={"default": "auto; eager with a disk tier, and where others load"},
        ),
    ] = None
    store_horizon: Annotated[
        Annotated[int, Meta(ge=0, le=1 << 20)] | None,
        Meta(
            description="With `on_evict` and `auto`: free blocks, next in line to be reused, whose "
            "chunks are stored ahead. Without it, as many as a step took lately at most. What a "
            "step takes beyond it is copied in that step.",
            extra={"default": "a step's"},
        ),
    ] = None
    exclusive: Annotated[
        bool,
        Meta(
            description="With `on_evict` and `auto`: chunks that were loaded into the engine's own "
            "cache are the first that memory evicts, until the engine gives them up."
        ),
    ] = False
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
            description="Most seconds that a request waits for disk; then it recomputes.",
        ),
    ] = 2.0
    self_test: Annotated[
        bool, Meta(description="At start-up, round trip of the artifact's probe rows.")
    ] = True

    @property
    def rounds_states(self) -> bool:
        """Whether float32 states are kept as bfloat16."""
        return self.state_codec == "bf16"

    @property
    def target_ratio(self) -> float:
        """Ratio of the plan; 1.0 for the raw codec. Of `quality`, once an artifact is chosen."""
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
