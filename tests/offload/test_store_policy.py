"""What is stored and when: filters that compose, and a policy that stores later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvtc_vllm.config import load_config
from kvtc_vllm.offload.messages import NO_ADAPTER, WorkerReport
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.offload.store_policy import (
    Candidate,
    Eager,
    Nothing,
    OptOut,
    PromptOnly,
    SeenOften,
    StorePolicy,
    make_store_policy,
)
from tests.connector.fakes import BLOCK, BOUND, FakeOutput, FakeRequest, geometry, start

CHUNK = 4 * BLOCK


def candidate(number: int = 0, prompt: int = 10 * CHUNK, **params: Any) -> Candidate:
    request = FakeRequest("r", prompt)
    request.kv_transfer_params = params  # type: ignore[attr-defined]
    first = number * CHUNK
    key = f"chunk {number}".encode()
    return Candidate(key, request, first, first + CHUNK, ([0, 1, 2, 3],), NO_ADAPTER)  # type: ignore[arg-type]


def chosen(policy: StorePolicy, *chunks: Candidate) -> list[bytes]:
    return [chunk.key for chunk in policy.completed(chunks)]


def test_filters_pass_on_what_they_take() -> None:
    chunks = [candidate(0), candidate(1), candidate(2, prompt=CHUNK)]
    assert chosen(Eager(), *chunks) == [b"chunk 0", b"chunk 1", b"chunk 2"]
    assert chosen(Nothing(), *chunks) == []
    assert chosen(OptOut(Eager()), *chunks) == [b"chunk 0", b"chunk 1", b"chunk 2"]
    assert chosen(OptOut(Eager()), candidate(3, kvtc_store=False)) == []
    assert chosen(PromptOnly(Eager()), *chunks) == [b"chunk 0", b"chunk 1"]
    assert chosen(OptOut(PromptOnly(Eager())), *chunks) == [b"chunk 0", b"chunk 1"]


def test_a_request_is_counted_once_until_it_ends() -> None:
    refused: list[int] = []
    policy = SeenOften(Eager(), 2, lambda: refused.append(1))
    assert chosen(policy, candidate()) == []
    assert chosen(policy, candidate()) == []  # preempted: the same request again
    assert len(refused) == 1
    policy.forget("r")
    assert chosen(policy, candidate()) == [b"chunk 0"]


@pytest.mark.parametrize("stores", [True, False])
@pytest.mark.parametrize("prompt_only", [True, False])
@pytest.mark.parametrize("threshold", [1, 2])
def test_a_configuration_makes_what_it_says(
    stores: bool, prompt_only: bool, threshold: int
) -> None:
    policy = make_store_policy(
        stores=stores, prompt_only=prompt_only, threshold=threshold, refused=lambda: None
    )
    generated = candidate(1, prompt=CHUNK)
    expected = []
    if stores and threshold == 1:
        expected = [b"chunk 0"] if prompt_only else [b"chunk 0", b"chunk 1"]
    assert chosen(policy, candidate(), generated) == expected
    assert chosen(policy, candidate(2, kvtc_store=False)) == []


class OneStepLater(Eager):
    """Keeps chunks back until the step after."""

    def __init__(self) -> None:
        self.kept: list[Candidate] = []

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        self.kept += chunks
        return ()

    def due(self) -> Sequence[Candidate]:
        kept, self.kept = self.kept, []
        return kept

    def clear(self) -> None:
        self.kept.clear()


def lazy() -> tuple[KVTCScheduler, OneStepLater]:
    config = load_config({"codec": "kvtc", "memory_bytes": "1MiB"})
    policy = OneStepLater()
    side = KVTCScheduler(config, geometry(), [BOUND], prompt_only=False, store_policy=policy)
    return side, policy


def test_what_is_due_is_staged_before_the_next_forward() -> None:
    side, _ = lazy()
    request = FakeRequest("r", 2 * CHUNK)
    first = start(side, request, list(range(8)), 2 * CHUNK)
    assert first.stores == first.stage_first == []
    later = side.plan_step(FakeOutput())
    assert [(item.key, item.start, item.block_ids) for item in later.stage_first] == [
        (b"a:3", 0, [0, 1, 2, 3]),
        (b"a:7", CHUNK, [4, 5, 6, 7]),
    ]
    assert later.stores == []
    assert side.has_pending_work()
    stored = [(item.key, 0, 1000) for item in later.stage_first]
    side.apply_report(WorkerReport(later.epoch, stored), None)
    assert [side.index.is_ready(key) for key in (b"a:3", b"a:7")] == [True, True]


def test_chunks_may_be_due_when_their_request_has_ended() -> None:
    side, _ = lazy()
    request = FakeRequest("r", CHUNK)
    start(side, request, [3, 4, 5, 6], CHUNK)
    side.finish(request)
    later = side.plan_step(FakeOutput(finished_req_ids={"r"}))
    assert [item.block_ids for item in later.stage_first] == [[3, 4, 5, 6]]


def test_what_is_kept_back_does_not_outlive_its_names() -> None:
    side, policy = lazy()
    start(side, FakeRequest("r", CHUNK), [0, 1, 2, 3], CHUNK)
    assert policy.kept
    side.reset()
    assert side.plan_step(FakeOutput()).stage_first == []
