"""Returns in turns on several servers, each confirmed by the counters of its server."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from benchmarks.demo.server import Answer
from benchmarks.serving.prompts import Prompt

Metrics = dict[str, float]

SPINNING_SECONDS = 1.5
"""An engine's processes poll their queue for a second after a request, on a core that the server
asked next needs (`SpinCondition` of vLLM's shm_broadcast.py)."""


class Asked(Protocol):
    """What is asked: `benchmarks.demo.server.Server`."""

    def complete(self, token_ids: list[int], max_tokens: int) -> Answer: ...
    def settle(self) -> Metrics: ...
    def forget(self) -> None: ...


class Row(msgspec.Struct, kw_only=True):
    """One server at one length.

    tokens: of the prompt. reloaded: of these, from the tier, in every round. ttft_ms: median.
    ratio: median over rounds of the time over that of recomputing in the same round; ratio_least
    and ratio_most are its spread. loaded_bytes: read from the tier per return. real_ratio: bytes
    of KV over these, 0 if nothing was read. samples_ms: of every round.
    """

    name: str
    tokens: int
    reloaded: int
    ttft_ms: float
    ratio: float
    ratio_least: float
    ratio_most: float
    loaded_bytes: int
    real_ratio: float
    samples_ms: list[float]


class Return(msgspec.Struct, frozen=True):
    """One request. seconds: to its first token. The rest is what the counters grew by."""

    seconds: float
    reloaded: int
    loaded_bytes: int
    loaded_raw_bytes: int


def measure(
    servers: Mapping[str, Asked],
    baseline: str,
    prompts: Sequence[Prompt],
    expected: Sequence[int],
    pause: float = SPINNING_SECONDS,
) -> Iterator[Row]:
    """Rows of one length after the other.

    baseline: the server that recomputes. expected: per prompt, tokens that every other server
    has to reload. pause: seconds before every return. The first round is not counted. Raises
    RuntimeError if counters tell something else than `expected`.
    """
    for prompt, tokens in zip(prompts, expected, strict=True):
        returns: dict[str, list[Return]] = {name: [] for name in servers}
        for server in servers.values():
            server.complete(list(prompt.past), 1)
            server.settle()
        for number in range(len(prompt.ends)):
            for name in _order(list(servers), number):
                wanted = 0 if name == baseline else tokens
                found = one_return(servers[name], prompt.of_round(number), name, wanted, pause)
                if number:
                    returns[name].append(found)
        for name in servers:
            yield _row(name, prompt.length, returns[name], returns[baseline])


def one_return(server: Asked, token_ids: list[int], name: str, wanted: int, pause: float) -> Return:
    """Drop what vLLM has cached, ask, and check where the prompt came from.

    wanted: tokens that have to come from the tier. pause: seconds between the two. Raises
    RuntimeError if vLLM's counter, the connector's or `wanted` differ, or if vLLM found something
    in its own cache.
    """
    server.forget()
    before = server.settle()
    time.sleep(pause)
    seconds = server.complete(token_ids, 1).ttft
    after = server.settle()

    def grown(counter: str) -> int:
        return round(after.get(f"vllm:{counter}", 0) - before.get(f"vllm:{counter}", 0))

    counted = {
        counter: grown(counter)
        for counter in ("external_prefix_cache_hits", "kvtc_hit_tokens", "kvtc_loaded_tokens")
    }
    cached = grown("prefix_cache_hits")
    if set(counted.values()) != {wanted} or cached:
        raise RuntimeError(
            f"{name}, {len(token_ids)} tokens: {wanted} should come from the tier and none from "
            f"vLLM's cache; counted: {counted}, prefix_cache_hits {cached}"
        )
    return Return(seconds, wanted, grown("kvtc_loaded_bytes"), grown("kvtc_loaded_raw_bytes"))


def _order(names: list[str], number: int) -> list[str]:
    """Another server begins in every round, so that what else the machine does meets all."""
    shift = number % len(names)
    return names[shift:] + names[:shift]


def _row(name: str, tokens: int, returns: list[Return], base: list[Return]) -> Row:
    ratios = [ours.seconds / theirs.seconds for ours, theirs in zip(returns, base, strict=True)]
    last = returns[-1]
    return Row(
        name=name,
        tokens=tokens,
        reloaded=last.reloaded,
        ttft_ms=round(1e3 * statistics.median(r.seconds for r in returns), 1),
        ratio=round(statistics.median(ratios), 3),
        ratio_least=round(min(ratios), 3),
        ratio_most=round(max(ratios), 3),
        loaded_bytes=last.loaded_bytes,
        real_ratio=round(last.loaded_raw_bytes / last.loaded_bytes, 2) if last.loaded_bytes else 0,
        samples_ms=[round(1e3 * r.seconds, 1) for r in returns],
    )


def table(rows: Sequence[Row]) -> str:
    """Plain-text table, one line per row."""
    lines = [
        f"{'tokens':>6}  {'row':10} {'reloaded':>8} {'TTFT ms':>8} {'of recompute':>12} "
        f"{'(least - most)':>15} {'MB read':>8} {'real ratio':>10}"
    ]
    for row in rows:
        spread = f"({row.ratio_least:.2f} - {row.ratio_most:.2f})"
        lines.append(
            f"{row.tokens:6}  {row.name:10} {row.reloaded:8} {row.ttft_ms:8.0f} "
            f"{row.ratio:12.2f} {spread:>15} {row.loaded_bytes / 1e6:8.2f} "
            f"{f'{row.real_ratio:.1f}' if row.real_ratio else '-':>10}"
        )
    return "\n".join(lines)
