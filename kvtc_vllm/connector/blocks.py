"""Block tables of running requests, rebuilt from what vLLM's scheduler sends each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class StepProgress:
    """One request in one step: tokens computed before it, and whether it was preempted."""

    computed: int
    scheduled: int
    resumed: bool


@dataclass
class BlockTables:
    """request id -> its block ids, in order of position. One KV cache group."""

    ids: dict[str, list[int]] = field(default_factory=dict)

    def update(self, scheduler_output: Any) -> dict[str, StepProgress]:
        """Apply one step's `SchedulerOutput`; returns the requests scheduled in it.

        A resumed (preempted) request comes back with a whole new table.
        """
        progress: dict[str, StepProgress] = {}
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self.ids[new.req_id] = list(new.block_ids[0])
            progress[new.req_id] = StepProgress(
                new.num_computed_tokens, scheduled[new.req_id], False
            )
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            resumed = request_id in cached.resumed_req_ids
            blocks = cached.new_block_ids[i]
            if resumed:
                self.ids[request_id] = list(blocks[0]) if blocks else []
            elif blocks:
                self.ids.setdefault(request_id, []).extend(blocks[0])
            progress[request_id] = StepProgress(
                cached.num_computed_tokens[i], scheduled.get(request_id, 0), resumed
            )
        return progress

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self.ids.pop(request_id, None)
