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

The promise is that no request waits for its load longer than its recomputation would have taken,
with that of all that was before it. So it is given up when it has waited as long (`load_planned`),
and before that as soon as it is expected to wait longer and recomputing what it lacks takes less
time than loading it (`give_up`). What is expected follows what runs: every batch of chunks is a
sample when it ends, and one that has not ended is no faster than it has been.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from kvtc_vllm.offload.load_queue import LoadQueue, QueuedLoad
from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.offload.prefill_queue import PrefillQueue
from kvtc_vllm.offload.rates import Rate

MIN_PREFILL_TOKENS = 64
"""Steps with fewer tokens are decoding, which says nothing about prefill."""
PROBE_EVERY = 16
UNPROVEN_LOADS = 8
"""Loads at once while it is not known what is faster: more would be a queue of unknown length."""
STEPS_AHEAD = 2
"""Of computing, beyond which no load is given up. Computing slows loads on a CPU, so to give up all
that is late now would make more late."""
STEPS_IN_FLIGHT = 64
"""Steps whose time is taken at once; vLLM plans one or two ahead."""


class Way(Enum):
    """How a request comes to its KV."""

    LOAD = "load"
    COMPUTE = "compute"
    LATER = "later"
    """To be asked again in the next step."""


class _Put(NamedTuple):
    """A request that was told to come later.

    until: time on the clock from which on it is computed whatever else runs.
    """

    tokens: int
    until: float


class LoadPolicy:
    """Used by the scheduler's thread only.

    enabled: False offers every load. ranks: that load; each reports its own tokens. keeps_part:
    whether what was loaded of a load that is given up need not be recomputed.
    """

    def __init__(
        self,
        enabled: bool,
        ranks: int = 1,
        keeps_part: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._clock = clock
        self._ranks = ranks
        self._keeps_part = keeps_part
        self._load = Rate()
        self._prefill = Rate()
        self._refused = 0
        self._loads = LoadQueue()
        self._late: set[str] = set()
        self._trials: set[str] = set()
        self._begun = PrefillQueue()
        self._begun_instead = PrefillQueue()  # of these, what could have been loaded
        self._put_off: dict[str, _Put] = {}
        self._put_off_now = 0  # tokens of requests put off since the last step was planned
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=STEPS_IN_FLIGHT)
        self._last_result = 0.0

    def observe_loads(self, pace: Pace) -> None:
        """Take note of how the threads of all ranks load, in tokens."""
        if pace.ended:
            self._load.add(pace.ended, pace.seconds)
            self._loads.progress(pace.ended // self._ranks)
            self._refused = 0
        if pace.running:
            self._load.add_running(pace.running, pace.running_seconds)

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
        if not self._prefill.known:
            return Way.LOAD if self._may_try(request_id) else Way.COMPUTE
        known = self._load.known or self._may_try(request_id)
        if known and self._should_load(request_id, tokens):
            self._put_off.pop(request_id, None)
            return Way.LOAD
        put = self._put_off.get(request_id)
        if put is None:
            self._refused += request_id not in self._late
            if self._refused >= PROBE_EVERY:
                self._refused = 0
                self._trials.add(request_id)
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
        before = self.tokens_before
        patience = 0.0
        if self._enabled and self._prefill.known:
            patience = (before + tokens) * self._prefill.value
        on_trial = request_id in self._trials
        if on_trial:  # its end is seen a step later, and must not be too late then
            patience /= 2
        load = QueuedLoad(tokens, tokens, self._clock(), before, patience, on_trial)
        self._loads.begin(request_id, load)
        return patience

    def give_up(self) -> list[str]:
        """Requests whose loads are to end now. Call once per step.

        Of each the load would end later than the request would have been computed, all before it
        included, and computing what is left of it now takes less than loading it. No more than will
        soon be computed: the others may still be loaded in time.
        """
        given_up: list[str] = []
        load_rate, prefill_rate = self._load.value, self._prefill.value
        if not (self._enabled and self._prefill.known and load_rate):
            return given_up
        now, ahead, queued = self._clock(), self._ahead, 0
        enough = STEPS_AHEAD * self._prefill.most_tokens
        for request_id, load in self._loads.running():
            if ahead >= enough:
                break
            left = load.left if self._keeps_part else load.tokens
            waits = (queued + load.left) * load_rate + self._seen_after
            promised = load.began + (load.before + load.tokens) * prefill_rate
            late = now + waits > promised and waits > (ahead + left) * prefill_rate
            if late and load.left and load.wanted and not load.on_trial:
                ahead += left
                self._loads.give_up(load)
                self._late.add(request_id)
                given_up.append(request_id)
            else:
                queued += load.left
        return given_up

    def worth_waiting(self, tokens: int) -> float:
        """Seconds after which `tokens` tokens that the tier must fetch first are of no use.

        They are loaded then, and the request may not wait longer for all this than for its
        recomputation. Infinite where that is not known or not asked for.
        """
        if not (self._enabled and self._load.known and self._prefill.known):
            return math.inf
        computed = (self.tokens_before + tokens) * self._prefill.value
        return computed - (self._loads.left + tokens) * self._load.value - self._seen_after

    def load_ended(self, request_id: str) -> None:
        """Take note that a load has ended, well or not."""
        load = self._loads.end(request_id)
        if load is not None and load.patience and self._clock() >= load.began + load.patience:
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
        self._trials.discard(request_id)
        load = self._loads.get(request_id)
        if load is not None:
            load.patience = 0.0
            load.wanted = False
        self._put_off.pop(request_id, None)
        self._begun.forget(request_id)
        self._begun_instead.forget(request_id)

    @property
    def tokens_before(self) -> int:
        """That the engine would compute before those of a request that is asked about, if it
        computed what it loads as well."""
        return self._loads.left + self._ahead

    @property
    def _ahead(self) -> int:
        """Tokens that are computed before those of the request that is asked about."""
        running = sum(tokens for _, tokens, _ in self._steps)
        return running + self._begun.tokens + self._put_off_now

    @property
    def _seen_after(self) -> float:
        """Seconds between the end of a load and the end of the step in which the engine sees it.

        Half of a step that computes; others are short.
        """
        return min(self._ahead, self._prefill.most_tokens) / 2 * self._prefill.value

    def _may_try(self, request_id: str) -> bool:
        """Whether to load while it is not known what is faster."""
        return len(self._loads) < UNPROVEN_LOADS and request_id not in self._late

    def _should_load(self, request_id: str, tokens: int) -> bool:
        if request_id in self._late:
            return False
        step = min(tokens, self._prefill.most_tokens)
        delay = len(self._loads) * step / 2  # in tokens, of all loads together
        computed = (self._ahead + tokens + delay) * self._prefill.value
        return (self._loads.left + tokens) * self._load.value + self._seen_after <= computed

    def _has_room(self, tokens: int) -> bool:
        """Whether a computation may begin in this step."""
        begun = self._begun_instead.tokens
        return not begun or not len(self._loads) or begun + tokens <= self._loads.shortest
