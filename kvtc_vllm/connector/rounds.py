"""Rounds of all ranks of an engine, in which each gets what the others give, and no one is waited
for in vain.

Every rank's KV depends on the weights of all, so ranks make names of it together when they start:
a rank knows its own only. Where data-parallel engines hold experts of each other, it depends on
theirs as well.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.distributed.parallel_state import get_dp_group, model_parallel_is_initialized

from kvtc_vllm.offload.names import Gather

if TYPE_CHECKING:
    from types import TracebackType

    from vllm.config import VllmConfig
    from vllm.distributed.parallel_state import GroupCoordinator

PATIENCE_SECONDS = 300.0
"""For a rank that does not come to a round: vLLM may have failed on it where nobody tells us. It
has computed with the others just before, and what it does between takes seconds."""


def among_ranks(value: Any) -> list[Any]:
    """A `Gather` of this engine's workers, stage by stage; their groups must be there."""
    stages = _gathered(get_pp_group(), _gathered(get_tp_group(), value))
    return [found for stage in stages for found in stage]


def _gathered(group: GroupCoordinator, value: Any) -> list[Any]:
    if group.world_size == 1:
        return [value]
    # Without waiting in the exchange itself, which only ends with the group's own half an hour.
    arrived = torch.distributed.barrier(group=group.cpu_group, async_op=True)
    try:
        arrived.wait(timedelta(seconds=PATIENCE_SECONDS))
    except RuntimeError as error:
        raise RuntimeError(
            f"kvtc: another rank did not come to the start within {PATIENCE_SECONDS:g} seconds, or "
            "ended; its own message says why"
        ) from error
    found: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(found, value, group=group.cpu_group)
    return found


class Rounds:
    """A `Gather` that ends for all ranks if one of them can't start.

    Used in a `with` for everything that a start does: a rank that leaves it by an exception tells
    the others, whatever round they wait in. What all have begun together, by `started`, is not
    ended by one of them any more.
    """

    def __init__(self, gather: Gather = among_ranks) -> None:
        self._gather = gather
        self._over = False

    def __call__(self, own: Any) -> list[Any]:
        """Raises RuntimeError if another rank has left, or did not come."""
        try:
            told = self._gather((True, own))
        except Exception:
            self._over = True  # who did not come can't be told anything either
            raise
        if not all(there for there, _ in told):
            self._over = True
            raise RuntimeError("kvtc: another rank could not start; its own message says why")
        return [value for _, value in told]

    def started(self) -> None:
        """All ranks have held the last round of the start."""
        self._over = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._over:
            self._over = True
            with suppress(Exception):  # what ended the start is what is told
                self._gather((False, None))


def rounds_of_engine() -> Rounds | None:
    """Those of this worker's engine; None if it is its only rank."""
    if not model_parallel_is_initialized():
        return None
    ranks = get_tp_group().world_size * get_pp_group().world_size
    return Rounds() if ranks > 1 else None


def shares_experts(vllm_config: VllmConfig) -> bool:
    """Whether data-parallel engines compute with experts that others of them hold.

    vLLM makes engines of models without experts independent of each other, and calls them one. With
    `enable_eplb` experts are in no name, and engines may join others that serve already.
    """
    parallel = vllm_config.parallel_config
    return parallel.data_parallel_size > 1 and not getattr(parallel, "enable_eplb", False)


def among_engines(vllm_config: VllmConfig) -> Gather | None:
    """A `Gather` of the workers in this one's place of all engines that share experts; None if none
    do.

    They all start together, and make no further step together.
    """
    return partial(_gathered, get_dp_group()) if shares_experts(vllm_config) else None
