"""Hit rate of an LRU cache in the long run, by Che's approximation extended to conversations.

Che: there is one time T such that a thing is in the cache if and only if it was used within the
last T seconds. T is where what was used within T fills the cache. Conversations start as a Poisson
process; within one, turns are exponential gaps (thinking) after a constant one (serving) apart. So
uses come in clusters, not one by one: a thing whose conversations start at rate r was not used
within T with probability exp(-r * (T + sum over gaps of E[min(gap, T)])), the length of the union
of all windows of T seconds before uses.

    H. Che, Y. Tung, Z. Wang: Hierarchical Web Caching Systems. IEEE JSAC 20 (2002).
    C. Fricker, P. Robert, J. Roberts: A versatile and accurate approximation for LRU cache
    performance. ITC 24 (2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvtc_vllm.load_test.traffic import Traffic, zipf_weights
from kvtc_vllm.planning.lookups import Rules, lengths

_STEPS = 200


@dataclass(frozen=True)
class Pace:
    """starts: conversations per second. serve_seconds, think_seconds: the two halves of a gap."""

    starts: float
    serve_seconds: float
    think_seconds: float

    def returned(self, seconds: float) -> float:
        """Probability that the next turn comes within so many seconds."""
        left = seconds - self.serve_seconds
        if left < 0:
            return 0.0
        return 1.0 if not self.think_seconds else -math.expm1(-left / self.think_seconds)

    def waited(self, seconds: float) -> float:
        """E[min(gap, seconds)]."""
        left = seconds - self.serve_seconds
        if left < 0:
            return seconds
        return self.serve_seconds + self.think_seconds * self.returned(seconds)


@dataclass(frozen=True)
class Steady:
    """hit_tokens: per conversation, mean. prompt_tokens: per conversation. seconds: Che's T."""

    hit_tokens: float
    prompt_tokens: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that the cache serves."""
        return self.hit_tokens / self.prompt_tokens


def steady(traffic: Traffic, rules: Rules, pace: Pace, capacity_tokens: float) -> Steady:
    """The long run of traffic that never ends; `traffic.conversations` is not used."""
    model = _Model(traffic, rules, pace)
    low, high = 0.0, 1.0
    while model.resident(high) < capacity_tokens and high < 1e12:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if model.resident(middle) < capacity_tokens:
            low = middle
        else:
            high = middle
    return Steady(model.hits(low), sum(model.lengths.prompts), low)


class _Model:
    """Tokens in the cache and hits per conversation, as functions of Che's time."""

    def __init__(self, traffic: Traffic, rules: Rules, pace: Pace) -> None:
        self._traffic, self._rules, self._pace = traffic, rules, pace
        self.lengths = lengths(traffic, rules)
        self._prefixes = zipf_weights(traffic.prefixes, traffic.zipf)
        documents = zipf_weights(traffic.documents, traffic.zipf) if traffic.documents else []
        if not traffic.document_tokens:
            documents = []
        # A document's chunks are those of a document behind one system message.
        self._pairs = [prefix * one for prefix in self._prefixes for one in documents]
        chunk = rules.chunk_tokens
        self._prefix_tokens = self.lengths.prefix // chunk * chunk
        self._shared_tokens = self._prefix_tokens
        if self._pairs:
            self._shared_tokens = self.lengths.document // chunk * chunk

    def resident(self, seconds: float) -> float:
        """Expected tokens used within the last `seconds`."""
        document = self._shared_tokens - self._prefix_tokens
        tokens = sum(self._present(one, seconds) for one in self._prefixes) * self._prefix_tokens
        tokens += sum(self._present(one, seconds) for one in self._pairs) * document
        # What a turn adds of its own is used in that turn and in all later ones.
        chunk, before = self._rules.chunk_tokens, self._shared_tokens
        for turn, stored in enumerate(self.lengths.stored):
            whole = max(before, stored // chunk * chunk)
            uses = seconds + (self._traffic.turns - 1 - turn) * self._pace.waited(seconds)
            tokens += (whole - before) * self._pace.starts * uses
            before = whole
        return tokens

    def hits(self, seconds: float) -> float:
        """Expected hit tokens of one conversation, all turns."""
        returned = self._pace.returned(seconds)
        # Each thing by its popularity: the more popular, the more conversations see its state.
        prefixes = [(one, self._present(one, seconds)) for one in self._prefixes]
        pairs = [(one, self._present(one, seconds)) for one in self._pairs]
        prefix = sum(weight * present for weight, present in prefixes)
        pair = sum(weight * present for weight, present in pairs)
        total = 0.0
        for turn, prompt in enumerate(self.lengths.prompts):
            back = returned if turn else 0.0
            own = self.lengths.stored[turn - 1] if turn else 0
            parts = (
                (0, self._prefix_tokens, 1 - (1 - back) * (1 - prefix)),
                (self._prefix_tokens, self._shared_tokens, 1 - (1 - back) * (1 - pair)),
                (self._shared_tokens, max(own, self._shared_tokens), back),
            )
            for begin, end, chance in parts:
                gained = self._rules.reusable(end, prompt) - self._rules.reusable(begin, prompt)
                total += chance * gained
        return total

    def _present(self, popularity: float, seconds: float) -> float:
        """Probability that a shared thing was used within the last `seconds`."""
        uses = seconds + (self._traffic.turns - 1) * self._pace.waited(seconds)
        return -math.expm1(-popularity * self._pace.starts * uses)
