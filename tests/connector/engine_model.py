"""An engine and its tier as arithmetic on a clock of its own: what the load gate makes of them.

A step computes at most `STEP` prompt tokens; ends of loads are seen at its end. `THREADS` threads
load batches of chunks, first come first served, at a pace that may change with time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from kvtc_vllm.offload.load_policy import LoadPolicy, Way
from kvtc_vllm.offload.pace import Pace

PROMPT = 1536
LOADED = 1408
"""Tokens of a prompt that the tier has."""
CHUNK = 128
BATCHES = (3, 3, 3, 2)
"""Chunks of a prompt that a thread loads together."""
THREADS = 2
STEP = 2048
PREFILL = 0.2e-3
"""Seconds per token."""
STEP_SECONDS = 0.005
"""Of a step without tokens, and on top of the others."""


@dataclass
class _Batch:
    request: Prompt
    chunks: int
    began: float = 0.0
    ends: float = 0.0
    given_up: bool = False


@dataclass
class Prompt:
    """A request, and what became of it."""

    name: str
    stored: bool
    left: int = PROMPT
    """Tokens to be computed or loaded."""
    ordered: float = 0.0
    patience: float = 0.0
    waited: float = 0.0
    """Seconds between the order of its load and the step at whose end the engine saw its end."""
    recomputed: float = 0.0
    """Seconds that recomputing it would have taken instead, with all before it, in full steps."""
    first_token: float = 0.0
    batches: int = 0
    """Of its load that did not end."""
    chunks: int = 0
    """That were loaded."""
    given_up: bool = False


@dataclass
class Engine:
    """Asked for everything at once. pace: seconds per token of a load at a time, all threads."""

    pace: Callable[[float], float]
    now: float = 0.0
    prompts: list[Prompt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = LoadPolicy(True, clock=lambda: self.now)
        self._queue: deque[_Batch] = deque()
        self._busy: list[_Batch] = []
        self._waiting: list[Prompt] = []
        self._computing: list[Prompt] = []
        self._loads: dict[str, Prompt] = {}
        self._step = 0
        self._done = Pace()

    def serve(self, count: int, stored: bool = True) -> list[Prompt]:
        """A burst of prompts that are all stored, or none; returns what became of them."""
        burst = [Prompt(f"{len(self.prompts) + n}", stored=stored) for n in range(count)]
        self.prompts += burst
        self._waiting += burst
        began = self.now
        while self._waiting or self._computing or self._loads:
            self._make_step()
            assert self.now < began + 100 * count, "somebody waits for ever"
        for prompt in burst:
            prompt.first_token -= began
            self.policy.forget(prompt.name)
        return burst

    def _make_step(self) -> None:
        scheduled: dict[str, int] = {}
        room = STEP
        for prompt in self._computing:
            scheduled[prompt.name] = min(prompt.left, room)
            room -= scheduled[prompt.name]
        for prompt in list(self._waiting):
            if not room:
                break
            if prompt.chunks or not prompt.stored:  # what was loaded is kept
                way = Way.COMPUTE
            elif self.policy.still_later(prompt.name):
                continue
            else:
                way = self.policy.decide(prompt.name, LOADED)
            if way is Way.LATER:
                continue
            self._waiting.remove(prompt)
            if way is Way.LOAD:
                self._order(prompt)
                continue
            self.policy.computation_begins(prompt.name, prompt.left, prompt.stored)
            self._computing.append(prompt)
            scheduled[prompt.name] = min(prompt.left, room)
            room -= scheduled[prompt.name]
        self._step += 1
        self.policy.step_planned(self._step, scheduled)
        for name in self.policy.give_up():
            self._give_up(self._loads[name])
        until = self.now + STEP_SECONDS + PREFILL * sum(scheduled.values())
        ended = self._load_until(until)
        self.now = until
        self.policy.step_ended(self._step)
        self.policy.observe_loads(self._take_pace())
        for prompt in ended:
            prompt.waited = self.now - prompt.ordered
            prompt.left = PROMPT - CHUNK * prompt.chunks
            del self._loads[prompt.name]
            self.policy.load_ended(prompt.name)
            self._waiting.insert(0, prompt)
        for prompt in list(self._computing):
            prompt.left -= scheduled.get(prompt.name, 0)
            if not prompt.left:
                prompt.first_token = self.now
                self._computing.remove(prompt)

    def _order(self, prompt: Prompt) -> None:
        steps = -(-(self.policy.tokens_before + LOADED) // STEP)
        prompt.recomputed = steps * (STEP * PREFILL + STEP_SECONDS)
        prompt.ordered, prompt.given_up = self.now, False
        prompt.patience = self.policy.load_planned(prompt.name, LOADED)
        for chunks in BATCHES:
            self._queue.append(_Batch(prompt, chunks))
            prompt.batches += 1
        self._loads[prompt.name] = prompt

    def _give_up(self, prompt: Prompt) -> None:
        prompt.given_up = True
        for batch in [batch for batch in self._queue if batch.request is prompt]:
            self._queue.remove(batch)
            prompt.batches -= 1
        for batch in self._busy:
            if batch.request is prompt:  # it ends with the chunk that is being read
                each = (batch.ends - batch.began) / batch.chunks
                read = (self.now - batch.began) // each + 1
                batch.ends = min(batch.ends, batch.began + read * each)
                batch.given_up = True

    def _load_until(self, until: float) -> list[Prompt]:
        """Move the threads on; returns whose loads have ended."""
        now = self.now
        while True:
            while self._queue and len(self._busy) < THREADS:
                batch = self._queue.popleft()
                prompt = batch.request
                each = self.pace(now) * THREADS * CHUNK
                until_late = prompt.ordered + prompt.patience - now if prompt.patience else inf
                read = 0 if prompt.given_up else max(0, min(until_late // each + 1, batch.chunks))
                batch.began, batch.given_up = now, read < batch.chunks
                batch.ends = now + read * each
                self._busy.append(batch)
            ends = min((batch.ends for batch in self._busy), default=until)
            if not self._busy or ends > until:
                break
            now = max(now, ends)
            batch = min(self._busy, key=lambda batch: batch.ends)
            self._busy.remove(batch)
            prompt = batch.request
            prompt.batches -= 1
            prompt.given_up |= batch.given_up
            if not prompt.given_up:
                prompt.chunks += batch.chunks
                self._done.ended += CHUNK * batch.chunks
                self._done.seconds += (batch.ends - batch.began) / THREADS
        return [prompt for prompt in self._loads.values() if not prompt.batches]

    def _take_pace(self) -> Pace:
        pace, self._done = self._done, Pace()
        for batch in self._busy:
            tokens = CHUNK * batch.chunks
            pace.join(Pace(0, 0.0, tokens, (self.now - batch.began) / THREADS))
        return pace
