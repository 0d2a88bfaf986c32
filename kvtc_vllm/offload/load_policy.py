"""Load or recompute: a load is offered only if it is expected to be faster.

Both stand in a queue. A load waits for the loads before it, a computation for the prompt tokens
that the engine has begun, and for those that were told to come later. So the time until all
before it and itself are done is compared. Both rates are medians, by tokens, of what this engine
measured last, so that a slow first call (a compilation, a cold page) does not decide. Until there
are enough samples loads are offered while there are only a few of them. After `PROBE_EVERY`
refusals without a load one is offered all the same, so that the rate of loads never goes stale.

An engine sees at the end of a step that a load has ended, so a computation delays every load that
runs, by half of its step on the average. That counts against it. Where loads are twice as fast as
computing or faster, a queue of loads alone is then the best for all. Where both run, computations
begin in portions: no more in a step than the shortest of the loads has tokens. The others are
asked for again in the next step, in their order, and begin at the latest when their turn comes
among the computations.

Whatever was expected: a load is given up, and its request computed, once it has waited as long as
it would have if the engine had computed it, and all that was before it (`load_planned`); where
loads are the faster way, after some times as long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from kvtc_vllm.offload.prefill_queue import PrefillQueue

WINDOW = 16
"""The newest samples count, as many as have together so many times the tokens of the largest: so
the short steps between loads, which tell of the costs of a step, soon don't push out the long ones
that tell the rate."""
MOST_SAMPLES = 256
LENIENCE = 3
"""How many times its patience a load may take where loads are faster than computing: once its turn
has come, it is still the faster way."""
MIN_SAMPLES = 5
MIN_PREFILL_TOKENS = 64
"""Steps with fewer tokens are decoding, which says nothing about prefill."""
PROBE_EVERY = 16
UNPROVEN_LOADS = 8
"""Loads at once while it is not known what is faster: more would be a queue of unknown length."""
STEPS_IN_FLIGHT = 64
"""Steps whose time is taken at once; vLLM plans one or two ahead."""


class Way(Enum):
    """How a request comes to its KV."""

    LOAD = "load"
    COMPUTE = "compute"
    LATER = "later"
    """To be asked again in the next step."""


class _Rate:
    """Seconds per token: half of the tokens were not slower."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=MOST_SAMPLES)
        self.most_tokens = 0
        """Of a sample."""
        self.value = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        samples = self._samples
        samples.append((seconds / tokens, tokens))
        self.most_tokens = max(count for _, count in samples)
        total = sum(count for _, count in samples)
        while total - samples[0][1] >= WINDOW * self.most_tokens:
            total -= samples.popleft()[1]
        left = total / 2
        for value, count in sorted(samples):
            left -= count
            if left <= 0:
                self.value = value
                break

    @property
    def known(self) -> bool:
        return len(self._samples) >= MIN_SAMPLES


class _Load(NamedTuple):
    """A load that runs. late: time on the clock from which on it is of no use; None for never."""

    tokens: int
    late: float | None


class _Put(NamedTuple):
    """A request that was told to come later.

    until: time on the clock from which on it is computed whatever else runs.
    """

    tokens: int
    until: float


class LoadPolicy:
    """Used by the scheduler's thread only. enabled: False offers every load."""

    def __init__(self, enabled: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled = enabled
        self._clock = clock
        self._load = _Rate()
        self._prefill = _Rate()
        self._refused = 0
        self._running: dict[str, _Load] = {}
        self._queued = 0
        self._shortest: int | None = None
        self._late: set[str] = set()
        self._begun = PrefillQueue()
        self._begun_instead = PrefillQueue()  # of these, what could have been loaded
        self._put_off: dict[str, _Put] = {}
        self._put_off_now = 0  # tokens of requests put off since the last step was planned
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=STEPS_IN_FLIGHT)
        self._last_result = 0.0

    def observe_load(self, tokens: int, seconds: float) -> None:
        """Take note of loads of `tokens` tokens that took `seconds`, decoding and scattering."""
        if tokens:
            self._load.add(tokens, seconds)
            self._refused = 0

    def step_planned(self, step: int, scheduled: Mapping[str, int]) -> None:
        """Start the clock of a step. scheduled: the tokens that it computes, by request."""
        self._begun.planned(scheduled)
        self._begun_instead.planned(scheduled)
        self._put_off_now = 0
        tokens = sum(scheduled.values())
        if tokens:
            self._steps.append((step, tokens, self._clock()))

    def step_ended(self, step: int) -> None:
        """Take the time of a step whose results came. Steps overlap: each counts from the last."""
        now = self._clock()
        while self._steps and self._steps[0][0] <= step:
            number, tokens, began = self._steps.popleft()
            if number == step:
                self.observe_step(tokens, now - max(began, self._last_result))
                self._last_result = now

    def observe_step(self, tokens: int, seconds: float) -> None:
        """Take note of a step that computed `tokens` tokens in `seconds`."""
        if tokens >= MIN_PREFILL_TOKENS:
            self._prefill.add(tokens, seconds)

    def decide(self, request_id: str, tokens: int) -> Way:
        """How a request should come to `tokens` tokens of which the tier has the KV.

        Ask all requests in the order in which they wait, and one that is not put off once.
        """
        if not self._enabled:
            return Way.LOAD
        if not self._knows_rates:
            return Way.LOAD if len(self._running) < UNPROVEN_LOADS else Way.COMPUTE
        if self._should_load(request_id, tokens):
            self._put_off.pop(request_id, None)
            return Way.LOAD
        put = self._put_off.get(request_id)
        if put is None:
            self._refused += request_id not in self._late
            if self._refused >= PROBE_EVERY:
                self._refused = 0
                return Way.LOAD
            put = _Put(tokens, self._clock() + self._ahead * self._prefill.value)
        if self._has_room(tokens) or self._clock() >= put.until:
            self._put_off.pop(request_id, None)
            return Way.COMPUTE
        self._put_off[request_id] = put
        self._put_off_now += tokens
        return Way.LATER

    def still_later(self, request_id: str) -> bool:
        """Whether a request that was put off need not be looked up yet. Takes constant time."""
        put = self._put_off.get(request_id)
        if put is None or self._has_room(put.tokens) or self._clock() >= put.until:
            return False
        if self._should_load(request_id, put.tokens):
            return False
        self._put_off_now += put.tokens
        return True

    def load_planned(self, request_id: str, tokens: int) -> float:
        """Take note of a load that begins.

        Returns the seconds after which it is of no use: of its recomputation, and of that of all
        that is before it. 0 if that is not known or not asked for.
        """
        self._drop_load(request_id)
        patience = 0.0
        if self._enabled and self._prefill.known:
            patience = (self._queued + self._ahead + tokens) * self._prefill.value
            if self._load.known and self._load.value < self._prefill.value:
                patience *= LENIENCE
        self._running[request_id] = _Load(tokens, self._clock() + patience if patience else None)
        self._queued += tokens
        self._shortest = None
        return patience

    def load_ended(self, request_id: str) -> None:
        """Take note that a load has ended, well or not."""
        load = self._drop_load(request_id)
        if load is not None and load.late is not None and self._clock() >= load.late:
            self._late.add(request_id)

    def computation_begins(self, request_id: str, tokens: int, instead: bool) -> None:
        """Take note that vLLM begins to compute the last `tokens` tokens of a request's prompt.

        instead: they could have been loaded.
        """
        self._begun.begin(request_id, tokens)
        if instead:
            self._begun_instead.begin(request_id, tokens)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that ended; its load may still run."""
        self._late.discard(request_id)
        if request_id in self._running:
            self._running[request_id] = self._running[request_id]._replace(late=None)
        self._put_off.pop(request_id, None)
        self._begun.forget(request_id)
        self._begun_instead.forget(request_id)

    @property
    def _knows_rates(self) -> bool:
        return self._load.known and self._prefill.known

    @property
    def _ahead(self) -> int:
        """Tokens that are computed before those of the request that is asked about."""
        running = sum(tokens for _, tokens, _ in self._steps)
        return running + self._begun.tokens + self._put_off_now

    def _should_load(self, request_id: str, tokens: int) -> bool:
        if request_id in self._late:
            return False
        step = min(tokens, self._prefill.most_tokens)
        delay = len(self._running) * step / 2  # in tokens, of all loads together
        computed = (self._ahead + tokens + delay) * self._prefill.value
        return (self._queued + tokens) * self._load.value <= computed

    def _has_room(self, tokens: int) -> bool:
        """Whether a computation may begin in this step."""
        begun = self._begun_instead.tokens
        if not begun or not self._running:
            return True
        if self._shortest is None:
            self._shortest = min(load.tokens for load in self._running.values())
        return begun + tokens <= self._shortest

    def _drop_load(self, request_id: str) -> _Load | None:
        load = self._running.pop(request_id, None)
        if load is not None:
            self._queued -= load.tokens
            self._shortest = None
        return load
