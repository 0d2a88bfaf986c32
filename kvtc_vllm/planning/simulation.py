"""The same traffic through LRU caches, chunk by chunk: what `kvtc bench` would meet.

Users think, ask and wait. An engine computes prompts one after the other, answers side by side.
Caches are inclusive, as vLLM's own is of the tiers behind it: each sees every prompt. A fleet is
many engines before one remote storage, as with LMCache.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from kvtc_vllm.load_test.traffic import Script, Traffic, scripts
from kvtc_vllm.planning.lookups import Lengths, Rules, lengths


@dataclass(frozen=True)
class Service:
    """Rates of one engine, in tokens per second: of prefill, and of one answer's decoding."""

    prefill_rate: float
    decode_rate: float


@dataclass
class Simulated:
    """Sums over the turns that count. seconds: to the end of the last answer.

    hit_tokens: by cache, those that it serves and no cache before it does.
    """

    prompt_tokens: int = 0
    hit_tokens: list[int] = field(default_factory=list)
    turns: int = 0
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that any cache serves."""
        return sum(self.hit_tokens) / self.prompt_tokens


class LruTokens:
    """Chunks under a budget of tokens. Of one prefix the tail is evicted first."""

    def __init__(self, capacity_tokens: float, chunk_tokens: int) -> None:
        self._most = int(capacity_tokens // chunk_tokens)
        self._chunks: OrderedDict[Hashable, None] = OrderedDict()

    def found(self, chunks: Sequence[Hashable]) -> int:
        """Length of the leading run of chunks that are here."""
        for count, chunk in enumerate(chunks):
            if chunk not in self._chunks:
                return count
        return len(chunks)

    def use(self, chunks: Sequence[Hashable]) -> None:
        """Keep chunks of one prefix, its head as the most recently used."""
        for chunk in reversed(chunks):
            self._chunks[chunk] = None
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > self._most:
            self._chunks.popitem(last=False)


@dataclass(frozen=True)
class Fleet:
    """engines: each with caches of its own. remote_tokens: of the storage behind all of them.

    scatter: every turn goes to an engine by lot; otherwise a conversation stays with one.
    """

    engines: int = 1
    remote_tokens: float = 0.0
    scatter: bool = False


def simulate(
    traffic: Traffic,
    rules: Rules,
    service: Service,
    clients: int,
    capacities: Sequence[float],
    skip: int = 0,
    fleet: Fleet = Fleet(),
) -> Simulated:
    """Hold all conversations with so many users.

    capacities: tokens, from an engine's first cache to its last. skip: conversations at the start
    that warm the caches and are not counted. In the result the remote storage is the last cache.
    """
    chunk = rules.chunk_tokens
    own = [[LruTokens(size, chunk) for size in capacities] for _ in range(fleet.engines)]
    remote = LruTokens(fleet.remote_tokens, chunk)
    result = Simulated(hit_tokens=[0] * (len(capacities) + 1))
    length = lengths(traffic, rules)
    users = _Users(traffic, clients)
    lot = random.Random(traffic.seed)
    free = [0.0] * fleet.engines
    for now, number, turn, script in users:
        engine = lot.randrange(fleet.engines) if fleet.scatter else number % fleet.engines
        prompt = length.prompts[turn]
        chunks = _chunks(traffic, script, number, length, length.stored[turn] // chunk, chunk)
        asked = chunks[: prompt // chunk]
        best, served = 0, []
        for cache in (*own[engine], remote):
            found = rules.reusable(cache.found(asked) * chunk, prompt)
            served.append(max(0, found - best))
            best = max(best, found)
            cache.use(chunks)
        free[engine] = max(free[engine], now) + (prompt - best) / service.prefill_rate
        end = free[engine] + traffic.answer_tokens / service.decode_rate
        users.answered(number, turn, script, end)
        result.seconds = max(result.seconds, end)
        if number >= skip:
            result.prompt_tokens += prompt
            result.turns += 1
            result.hit_tokens = [a + b for a, b in zip(result.hit_tokens, served, strict=True)]
    return result


class _Users:
    """Turns in the order of their time: (seconds, conversation, turn, script)."""

    def __init__(self, traffic: Traffic, clients: int) -> None:
        self._waiting = iter(enumerate(scripts(traffic)))
        self._events: list[tuple[float, int, int, Script]] = []
        for _ in range(clients):
            self._begin(0.0)

    def __iter__(self) -> Iterator[tuple[float, int, int, Script]]:
        while self._events:
            yield heapq.heappop(self._events)

    def answered(self, number: int, turn: int, script: Script, seconds: float) -> None:
        """The user thinks, or has no further question and makes room for another."""
        if turn + 1 < len(script.think_seconds):
            then = seconds + script.think_seconds[turn + 1]
            heapq.heappush(self._events, (then, number, turn + 1, script))
        else:
            self._begin(seconds)

    def _begin(self, seconds: float) -> None:
        if (one := next(self._waiting, None)) is not None:
            number, script = one
            heapq.heappush(self._events, (seconds, number, 0, script))


def _chunks(
    traffic: Traffic, script: Script, number: int, length: Lengths, count: int, chunk_tokens: int
) -> list[Hashable]:
    """Names of the first `count` chunks of a prefix: equal where the prefixes are."""
    found: list[Hashable] = []
    for index in range(count):
        end = (index + 1) * chunk_tokens
        if end <= length.prefix:
            found.append(("prefix", script.prefix, index))
        elif end <= length.document and traffic.documents:
            found.append(("document", script.prefix, script.document, index))
        else:
            found.append(("own", number, index))
    return found
