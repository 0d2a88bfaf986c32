"""Block tables of running requests, rebuilt from what vLLM's scheduler sends each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtc_vllm.offload.vllm_types import SchedulerOutput


@dataclass
class StepProgress:
    """One request in one step: tokens computed before it, and those that it computes."""

    computed: int
    scheduled: int


@dataclass
class BlockTables:
    """request id -> block table -> its block ids, in order of position.

    per_request: one for each of the engine's KV cache groups. Where an attention window has moved
    on, an id stays that names somebody else's block by now (`restore_points`).
    """

    per_request: int = 1
    ids: dict[str, list[list[int]]] = field(default_factory=dict)

    def update(self, scheduler_output: SchedulerOutput) -> dict[str, StepProgress]:
        """Apply one step's `SchedulerOutput`; returns the requests scheduled in it.

        A resumed (preempted) request comes back with a whole new table; to vLLM's second model
        runner it comes as a new one.
        """
        progress: dict[str, StepProgress] = {}
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self._begin(new.req_id)
            self._extend(new.req_id, new.block_ids)
            progress[new.req_id] = StepProgress(new.num_computed_tokens, scheduled[new.req_id])
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            resumed = request_id in cached.resumed_req_ids
            blocks = cached.new_block_ids[i]
            if resumed or request_id not in self.ids:
                self._begin(request_id)
            if blocks:
                self._extend(request_id, blocks)
            progress[request_id] = StepProgress(
                cached.num_computed_tokens[i], scheduled.get(request_id, 0)
            )
        return progress

    def forget(self, request_id: str) -> None:
        """Drop the table of a request that ended."""
        self.ids.pop(request_id, None)

    def _begin(self, request_id: str) -> None:
        self.ids[request_id] = [[] for _ in range(self.per_request)]

    def _extend(self, request_id: str, blocks: Sequence[Sequence[int]]) -> None:
        for table, added in zip(self.ids[request_id], blocks, strict=False):
            table.extend(added)
