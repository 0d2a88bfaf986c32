"""What the scheduler's side remembers of each request, and whether its KV may have a name.

KV may be stored under the present names only if all of it was computed by what these stand for:
not by weights of before an update, and not on top of blocks of theirs (`Freshness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvtc_vllm.offload.adapters import AdapterDigests, adapter_id
from kvtc_vllm.offload.freshness import Freshness
from kvtc_vllm.offload.messages import AdapterUse
from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.keys import RecordKey


@dataclass
class RequestState:
    """One request between its steps.

    adapter: what it computes with, None until workers have told it. nameless: they can't tell.
    unadmitted: chunks that too few requests have contained. began: first step that works for it.
    tainted: some of its KV may be of other weights than the present ones, so
    nothing of it may be stored. next_chunk: first that was not planned to be stored. looked_up:
    tokens that vLLM's own cache had. withheld: found, but in the recent window. bypassed: it must
    not or may not load. waited: for another request's load. admitted: the load gate's decision,
    None until it was asked. gated: tokens that it refused.
    """

    request: Request
    adapter: AdapterUse | None = None
    nameless: bool = False
    unadmitted: set[RecordKey] = field(default_factory=set)
    began: int | None = None
    tainted: bool = False
    next_chunk: int = 0
    looked_up: int = 0
    withheld: int = 0
    bypassed: bool = False
    waited: bool = False
    admitted: bool | None = None
    gated: int = 0


class RequestStates:
    """Requests that vLLM has shown us and that have not ended. Scheduler's thread only."""

    def __init__(self, ranks: int) -> None:
        self.adapters = AdapterDigests(ranks)
        self.freshness = Freshness()
        self._states: dict[str, RequestState] = {}

    def of(self, request: Request) -> RequestState:
        """The state of a request, new if it was not known."""
        state = self._states.get(request.request_id)
        if state is None:
            state = self._states[request.request_id] = RequestState(request)
        state.request = request
        return state

    def get(self, request_id: str) -> RequestState | None:
        """The state of a request that was asked for before."""
        return self._states.get(request_id)

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._states.pop(request_id, None)

    def find_adapter(self, state: RequestState) -> None:
        """Fill in its adapter, or have workers asked."""
        if state.adapter is None and not state.nameless:
            state.adapter = self.adapters.of(state.request)

    def begin(self, state: RequestState, step: int) -> None:
        """Work for a request, new or preempted, begins in `step` from what vLLM's cache has."""
        state.began = step
        state.tainted = self._is_on_suspects(state)

    def take_adapter(self, number: int, news: dict[int, bytes | None], step: int) -> None:
        """Workers told by rank what an adapter contains."""
        if self.adapters.report(number, news):
            self.freshness.changed(step, number)
            self._taint(step, number)
        use, nameless = self.adapters.known(number), self.adapters.is_nameless(number)
        if use is None and not nameless:
            return  # in no slot at present; what was named by it stays named
        for state in self._with_adapter(number):
            if not state.tainted:
                state.nameless = nameless
                if state.adapter != use:
                    state.adapter, state.next_chunk = use, 0

    def take_change(self, step: int) -> None:
        """The weights were found in `step` to be others than before."""
        self.freshness.changed(step)
        self._taint(step)

    def start_again(self) -> None:
        """All names are given up, and what was stored of a request has another name now."""
        for state in self._states.values():
            state.next_chunk = 0

    def taint_all(self) -> None:
        """Nothing that has begun can be stored any more."""
        for state in self._states.values():
            state.tainted = state.tainted or state.began is not None

    def _taint(self, step: int, adapter: int | None = None) -> None:
        """Requests that have KV of before `step` can't be stored any more."""
        for state in self._with_adapter(adapter):
            if state.began is not None and (state.began < step or self._is_on_suspects(state)):
                state.tainted = True

    def _is_on_suspects(self, state: RequestState) -> bool:
        return state.looked_up > 0 and self.freshness.suspects(adapter_id(state.request))

    def _with_adapter(self, number: int | None) -> Iterator[RequestState]:
        """All requests with this adapter; for None all."""
        for state in self._states.values():
            if number is None or adapter_id(state.request) == number:
                yield state
