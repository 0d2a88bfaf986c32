"""A vLLM engine in this process, paced as a server paces its own."""

from __future__ import annotations

import time
from typing import Any

REST_SECONDS = 0.001
"""As in the loop of a server's engine (vllm.v1.engine.core.EngineCoreProc)."""


def rest_in_idle_steps(llm: Any) -> None:
    """Let other threads run while a `vllm.LLM` of one process only waits for them.

    A server's loop sleeps after a step that computed nothing. `LLM` steps at once again; on a CPU
    it then holds Python's lock nearly all of the time, and threads that encode or decode wait up
    to 5 ms for it again and again: they take some ten times as long as in a server. An engine
    whose core has a process of its own is left as it is.
    """
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return
    step = core.step_fn

    def step_and_rest() -> Any:
        outputs, computed = step()
        if not computed and core.scheduler.has_requests():
            time.sleep(REST_SECONDS)
        return outputs, computed

    core.step_fn = step_and_rest
