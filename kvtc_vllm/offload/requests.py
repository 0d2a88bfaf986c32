"""What the scheduler's side remembers of each request, and whether its KV may have a name.

KV may be stored under the present names only if all of it was computed by what these stand for:
not by weights of before an update, and not on top of blocks of theirs (`Freshness`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvtc_vllm.offload.adapters import AdapterDigests, adapter_id
from kvtc_vllm.offload.block_tables import StepProgress
from kvtc_vllm.offload.freshness import Freshness
from kvtc_vllm.offload.load_policy import Way
from kvtc_vllm.offload.messages import AdapterUse, StoreItem
from kvtc_vllm.offload.origins import Origins
from kvtc_vllm.offload.vllm_types import Request

logger = logging.getLogger("vllm.kvtc")


@dataclass
class RequestState:
    """One request between its steps."""

    request: Request
    adapter: AdapterUse | None = None
    """What it computes with; None until workers have told it."""
    nameless: bool = False
    """Workers can't tell what it computes with."""
    began: int | None = None
    """First step that works for it."""
    tainted: bool = False
    """Some of its KV may be of other weights than the present ones: nothing of it is stored."""
    next_chunk: int = 0
    """First chunk that the store policy was not asked about."""
    looked_up: int = 0
    """Tokens that vLLM's own cache had at the last lookup."""
    withheld: int = 0
    """Tokens found in the tier, but in the recent window."""
    bypassed: bool = False
    """It must not or may not load."""
    waited: bool = False
    """It has waited for another request's load."""
    way: Way = Way.LATER
    """The load policy's decision; asked again as long as it is `LATER`."""
    put_off: bool = False
    """It has waited because others were loaded or computed first."""
    gated: int = 0
    """Tokens that the load policy refused."""
    passing: list[StoreItem] = field(default_factory=list)
    """Stores of its answer that are needed only as long as it ends near them."""
    loads: int = 0
    """That were planned for it since it began or was preempted."""
    preemptions: int = 0
    """How often it was preempted when it was last looked at."""
    junction: int = 0
    """Tokens of a prefix that it shares with requests before, and that could not be restored
    there; 0 for none."""


class RequestStates:
    """Requests that vLLM has shown us and that have not ended. Scheduler's thread only.

    boundary: tokens, see `CacheGeometry`. shares_experts: with other engines, each of which holds
    some of them.
    """

    def __init__(self, ranks: int, boundary: int, shares_experts: bool = False) -> None:
        self.shares_experts = shares_experts
        self._mixed = self._has_foreign = False
        self.adapters = AdapterDigests(ranks)
        self.freshness = Freshness()
        self._origins = Origins(boundary)
        self._states: dict[str, RequestState] = {}

    def of(self, request: Request) -> RequestState:
        """The state of a request, new if it was not known."""
        state = self._states.get(request.request_id)
        if state is None:
            state = self._states[request.request_id] = RequestState(request)
        state.request = request
        if state.preemptions != request.num_preemptions:
            state.preemptions, state.loads = request.num_preemptions, 0
        return state

    def get(self, request_id: str) -> RequestState | None:
        """The state of a request that was asked for before."""
        return self._states.get(request_id)

    def forget(self, request_id: str) -> None:
        """Drop the state of a request that ended."""
        self._states.pop(request_id, None)
        self._origins.forget(request_id)

    def find_adapter(self, state: RequestState) -> None:
        """Fill in its adapter, or have workers asked."""
        if state.adapter is None and not state.nameless:
            state.adapter = self.adapters.of(state.request)

    def begin(self, state: RequestState, step: int, loaded: int) -> None:
        """Note that work for a request, new or preempted, begins in `step` on vLLM's blocks.

        loaded: tokens that the tier adds to those of vLLM's cache.
        """
        state.began, state.next_chunk = step, 0
        self._origins.begins(state.request.request_id, state.looked_up + loaded)
        state.tainted = self._mixed or self._is_on_suspects(state)

    def take_adapter(self, number: int, news: dict[int, bytes | None], step: int) -> None:
        """Take over what workers told, by rank, of an adapter's contents."""
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
        """Taint what was computed before `step`, in which other weights were found."""
        self.freshness.changed(step)
        self._taint(step)

    def scheduled(
        self, progresses: Mapping[str, StepProgress]
    ) -> Iterator[tuple[RequestState, StepProgress]]:
        """The known requests of a step that is being planned."""
        for request_id in self._origins.of_others(progresses):
            self.take_foreign(request_id)
        for request_id, progress in progresses.items():
            state = self._states.get(request_id)
            if state is not None:
                yield state, progress

    def take_foreign(self, request_id: str) -> None:
        """Note that a request has KV that another connector loaded, which vLLM's cache has too.

        It and what begins on vLLM's cache, until that is emptied, is not stored.
        """
        if not self._has_foreign:
            self._has_foreign = True
            logger.warning(
                "kvtc: another connector loads KV; what is computed on it is not stored, since "
                "nobody here can tell what computed that"
            )
        self.freshness.mixed()
        found = self._states.get(request_id)
        since = None if found is None else found.began
        for state in self._states.values():
            begins = state.began is not None and since is not None and state.began >= since
            if state is found or (begins and state.looked_up > 0):
                state.tainted = True

    def start_again(self) -> None:
        """Have all chunks of all requests considered again, under new names.

        None where experts are shared, until `taint_all`: other engines may get their new weights
        later, and what is computed until then is of both.
        """
        if self.shares_experts and not self._mixed:
            logger.warning(
                "kvtc: weights have changed, and other engines hold experts of this model: nothing "
                "is stored until reset_prefix_cache(reset_connector=True)"
            )
        self._mixed = self.shares_experts
        if self._mixed:
            self.freshness.mixed()
        for state in self._states.values():
            state.next_chunk = 0
            state.tainted = state.tainted or self._mixed

    def taint_all(self) -> None:
        """Have nothing stored of any request that has begun, and all of those that will."""
        self._mixed = False
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
