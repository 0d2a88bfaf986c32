"""From traffic and hardware to conversations, hit rates, bytes per second, the worth of a disk."""

from __future__ import annotations

import msgspec

from kvtc_vllm.load_test.traffic import Traffic
from kvtc_vllm.planning.che import Pace, Steady, steady
from kvtc_vllm.planning.errors import PlanError
from kvtc_vllm.planning.lookups import Rules, lengths

_ROUNDS = 60


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One engine. Raises PlanError, naming the field, for values out of range.

    kv_bytes_per_token: uncompressed, of all that the tiers keep of it. gpu_cache_tokens: of vLLM's
    own cache. memory_bytes, disk_bytes: of the tiers; 0: none. prefill_rate: tokens per second.
    decode_rate: tokens per second of one answer. codec_rate: uncompressed bytes per second that all
    ranks together decode. disk_rate: stored bytes per second that are read. decoders: ranks that
    decode each byte; more than 1 where one copy is kept for several.
    """

    kv_bytes_per_token: int
    gpu_cache_tokens: int
    memory_bytes: int
    disk_bytes: int = 0
    prefill_rate: float = 10_000.0
    decode_rate: float = 50.0
    codec_rate: float = 10e9
    disk_rate: float = 2e9
    decoders: int = 1

    def __post_init__(self) -> None:
        positive = ("kv_bytes_per_token", "prefill_rate", "decode_rate", "codec_rate", "decoders")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise PlanError(f"{name} is {getattr(self, name)}, more than 0 is right")
        for name in ("gpu_cache_tokens", "memory_bytes", "disk_bytes", "disk_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise PlanError(f"{name} is {getattr(self, name)}, 0 or more is right")


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine does with all caches up to this one.

    capacity_tokens: of this one alone. conversations: of full length that fit into it.
    hit_rate: share of prompt tokens that is not computed, in the long run. turns_per_second: of all
    users. busy: share of the time that prefill takes; at 1 users wait for each other.
    loaded_bytes_per_second: stored bytes, from tiers and not from vLLM's own cache.
    stored_bytes_per_second: into the tiers.
    """

    capacity_tokens: int
    conversations: float
    hit_rate: float
    turns_per_second: float
    busy: float
    loaded_bytes_per_second: float
    stored_bytes_per_second: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """tiers: cumulative, by name. stored_bytes_per_token: real bytes.

    load_seconds, disk_load_seconds, recompute_seconds: of a whole context, from memory, from disk,
    and without any. disk_verdict: one sentence.
    """

    kv_bytes_per_token: int
    stored_bytes_per_token: float
    context_tokens: int
    tiers: dict[str, Tier]
    load_seconds: float
    disk_load_seconds: float
    recompute_seconds: float
    disk_verdict: str


def plan(traffic: Traffic, rules: Rules, hardware: Hardware, clients: int, ratio: float) -> Plan:
    """The long run. clients: users at a time; a new one comes when one has asked all.

    ratio: real one, bytes of KV over bytes stored. Raises PlanError for values out of range.
    """
    if clients < 1:
        raise PlanError(f"clients is {clients}, 1 or more is right")
    if not 1 <= ratio < float("inf"):
        raise PlanError(f"ratio is {ratio}, 1 or more is right")
    per_token = hardware.kv_bytes_per_token / ratio
    capacities = {
        "gpu": float(hardware.gpu_cache_tokens),
        "memory": hardware.memory_bytes / per_token,
        "disk": hardware.disk_bytes / per_token,
    }
    if not hardware.disk_bytes:
        del capacities["disk"]
    length = lengths(traffic, rules)
    tiers: dict[str, Tier] = {}
    best, own = 0.0, None
    for name, capacity in capacities.items():
        # Inclusive caches: the largest so far decides, the others only decide from where.
        best = max(best, capacity)
        found, pace, busy = _balance(traffic, rules, hardware, clients, best)
        own = found if own is None else steady(traffic, rules, pace, capacities["gpu"])
        loaded = max(0.0, found.hit_tokens - own.hit_tokens)
        new = length.stored[-1] - found.hit_tokens * length.stored[-1] / found.prompt_tokens
        tiers[name] = Tier(
            capacity_tokens=int(capacity),
            conversations=capacity / length.stored[-1],
            hit_rate=found.hit_rate,
            turns_per_second=pace.starts * traffic.turns,
            busy=busy,
            loaded_bytes_per_second=pace.starts * loaded * per_token,
            stored_bytes_per_second=0.0 if name == "gpu" else pace.starts * new * per_token,
        )
    context = length.prompts[-1]
    stored = context * per_token
    load = context * hardware.kv_bytes_per_token * hardware.decoders / hardware.codec_rate
    disk = stored / hardware.disk_rate + load if hardware.disk_rate else float("inf")
    return Plan(
        kv_bytes_per_token=hardware.kv_bytes_per_token,
        stored_bytes_per_token=per_token,
        context_tokens=context,
        tiers=tiers,
        load_seconds=load,
        disk_load_seconds=disk,
        recompute_seconds=context / hardware.prefill_rate,
        disk_verdict=_disk(tiers, hardware, disk, context / hardware.prefill_rate),
    )


def _balance(
    traffic: Traffic, rules: Rules, hardware: Hardware, clients: int, capacity: float
) -> tuple[Steady, Pace, float]:
    """Hit rate and pace that fit each other: hits shorten turns, and turns fill the cache."""
    prompts = sum(lengths(traffic, rules).prompts)
    answer = traffic.answer_tokens / hardware.decode_rate
    think = (traffic.turns - 1) * traffic.think_seconds
    hits = 0.0
    for _ in range(_ROUNDS):
        prefill = (prompts - hits) / hardware.prefill_rate
        cycle = prefill + traffic.turns * answer + think
        # The engine computes one prompt at a time: no more conversations than it has seconds for.
        cycle = max(cycle, clients * prefill)
        pace = Pace(clients / cycle, (cycle - think) / traffic.turns, traffic.think_seconds)
        found = steady(traffic, rules, pace, capacity)
        hits += (found.hit_tokens - hits) / 2
    return found, pace, min(1.0, pace.starts * prefill)


def _disk(tiers: dict[str, Tier], hardware: Hardware, load: float, recompute: float) -> str:
    if "disk" not in tiers:
        return "no disk is planned"
    gained = tiers["disk"].hit_rate - tiers["memory"].hit_rate
    wanted = tiers["disk"].loaded_bytes_per_second
    if load >= recompute:
        return f"no: a load takes {load:.2f} s where computing takes {recompute:.2f} s"
    if wanted > hardware.disk_rate:
        return f"no: {wanted / 1e6:,.0f} MB/s are wanted of {hardware.disk_rate / 1e6:,.0f} MB/s"
    if gained < 0.01:
        return f"not needed: it adds {gained:.1%} to the hit rate of memory"
    return f"yes: it adds {gained:.1%} to the hit rate of memory"
