"""The scheduler side alone: what is looked up, stored, loaded, evicted."""

from __future__ import annotations

import pytest

from kvtc_vllm.config import ConfigError
from kvtc_vllm.offload.load_policy import Way
from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.offload.rates import MIN_SAMPLES
from kvtc_vllm.offload.scheduler import MOST_LOADS, KVTCScheduler
from tests.connector.fakes import (
    BLOCK,
    FakeBlockPool,
    FakeNew,
    FakeOutput,
    FakeRequest,
    confirm,
    fill,
    scheduler,
    start,
    step,
)

CHUNK = 128


def test_stores_each_full_chunk_once_as_it_completes() -> None:
    side = scheduler()
    request = FakeRequest("r", 300)
    blocks = list(range(10, 20))
    first = start(side, request, blocks, 200)
    assert [(s.start, s.block_ids) for s in first.stores] == [(0, [10, 11, 12, 13])]
    second = step(side, request, 100)
    assert [(s.key, s.start) for s in second.stores] == [(b"a:7", 128)]
    assert second.stores[0].block_ids == [14, 15, 16, 17]
    assert step(side, request, 1).stores == []


def test_stores_decode_blocks_unless_told_not_to() -> None:
    for prompt_only, expected in ((False, [128]), (True, [])):
        side = scheduler(prompt_only=prompt_only)
        request = FakeRequest("r", 200)
        start(side, request, list(range(7)), 200)
        request.grow(257)
        stores = step(side, request, 57, new_blocks=([7, 8],)).stores
        assert [s.start for s in stores] == expected


def test_unconfirmed_tokens_are_never_stored() -> None:
    """Asynchronous scheduling runs ahead of the hashes."""
    side = scheduler()
    request = FakeRequest("r", 100)
    start(side, request, list(range(8)), 100)
    assert step(side, request, 156).stores == []


def test_a_known_or_pending_chunk_is_not_stored_again() -> None:
    side = scheduler()
    first, twin = FakeRequest("r", 256), FakeRequest("s", 256)
    metadata = start(side, first, list(range(8)), 256)
    assert len(metadata.stores) == 2
    assert start(side, twin, list(range(8, 16)), 256).stores == []
    confirm(side, metadata)
    late = FakeRequest("t", 256)
    assert start(side, late, list(range(16, 24)), 256).stores == []


@pytest.mark.parametrize(
    ("tokens", "local", "window", "expected"),
    [
        (1024, 0, 128, 896),  # all but the window
        (1000, 0, 128, 864),  # the window's start rounded down to a block
        (1024, 512, 128, 384),  # on top of vLLM's own hit
        (1024, 544, 128, 352),  # which may end inside a chunk
        (1024, 0, 0, 992),  # no window: one token must still be computed
        (1025, 0, 0, 1024),
        (200, 0, 128, 64),  # a chunk may be loaded in part
        (150, 0, 128, 0),
        (1024, 896, 128, 0),
    ],
)
def test_match_leaves_the_recent_window(
    tokens: int, local: int, window: int, expected: int
) -> None:
    side = scheduler(recent_window=window)
    fill(side, FakeRequest("r", 1025))
    request = FakeRequest("again", tokens)
    assert side.match(request, local) == expected
    assert side.match(request, local) == expected
    assert expected % BLOCK == 0


def test_match_stops_at_the_first_gap() -> None:
    side = scheduler(recent_window=0)
    request = FakeRequest("r", 512)
    metadata = start(side, request, list(range(16)), 512)
    kept = [s for s in metadata.stores if s.start != 256]
    side.apply_report(WorkerReport(0, [(s.key, 0, 10) for s in kept], [(b"a:11", 0)]), None)
    assert side.match(FakeRequest("s", 600), 0) == 256


def test_load_plan_covers_exactly_the_missing_blocks() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    request = FakeRequest("again", 640)
    assert side.match(request, 160) == 352
    blocks = list(range(100, 120))
    side.plan_load(request, (blocks,), 352)
    (job,) = side.plan_step(FakeOutput()).loads
    assert [(i.start, i.first_block, i.block_ids) for i in job.items] == [
        (128, 1, [105, 106, 107]),
        (256, 0, [108, 109, 110, 111]),
        (384, 0, [112, 113, 114, 115]),
    ]
    assert side.has_pending_work()
    request.num_computed_tokens = 512
    side.apply_report(None, {"again"})
    assert not side.has_pending_work()
    side.plan_load(request, (blocks,), 0)
    assert side.plan_step(FakeOutput()).loads == []


def test_chunks_being_loaded_are_not_evicted() -> None:
    side = scheduler(memory_bytes=5 * 6000, recent_window=0)
    fill(side, FakeRequest("r", 256))
    request = FakeRequest("again", 257)
    assert side.match(request, 0) == 256
    side.plan_load(request, (list(range(9)),), 256)
    other = FakeRequest("s", 4096, name="b")
    metadata = start(side, other, list(range(128)), 4096)
    assert metadata.stores
    assert not {b"a:3", b"a:7"} & set(metadata.evict)


def test_a_load_deferred_past_an_eviction_is_planned_and_left_to_fail() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    request = FakeRequest("again", 640)
    tokens = side.match(request, 0)
    side.reset()
    side.plan_load(request, (list(range(20)),), tokens)
    (job,) = side.plan_step(FakeOutput()).loads
    assert len(job.items) == 4
    side.apply_report(WorkerReport(1, bad=[job.items[0].key]), {"again"})
    assert not side.has_pending_work()


def test_a_bad_chunk_is_forgotten_once_its_load_ended() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    request = FakeRequest("again", 640)
    side.plan_load(request, (list(range(20)),), side.match(request, 0))
    side.plan_step(FakeOutput())
    side.apply_report(WorkerReport(0, bad=[b"a:7"]), {"again"})
    assert side.plan_step(FakeOutput()).evict == [b"a:7"]
    assert side.match(FakeRequest("third", 640), 0) == 128


def test_resumed_requests_get_a_new_table_and_retry_stores() -> None:
    side = scheduler()
    request = FakeRequest("r", 256)
    metadata = start(side, request, list(range(8)), 128)
    side.apply_report(WorkerReport(0, dropped=[(s.key, 0) for s in metadata.stores]), None)
    request.num_computed_tokens, request.num_preemptions = 0, 1
    blocks = list(range(50, 58))
    assert side.match(request, 0) == 0
    side.plan_load(request, (blocks,), 0)
    again = step(side, request, 256, resumed=True, new_blocks=(blocks,))
    assert [s.block_ids for s in again.stores] == [[50, 51, 52, 53], [54, 55, 56, 57]]


def test_vllm_s_second_model_runner_is_told_of_resumed_requests_as_of_new_ones() -> None:
    side = scheduler()
    request = FakeRequest("r", 256)
    metadata = start(side, request, list(range(8)), 256)
    side.apply_report(WorkerReport(0, dropped=[(s.key, 0) for s in metadata.stores]), None)
    request.num_computed_tokens, request.num_preemptions = 0, 1
    again = start(side, request, list(range(50, 58)), 256)
    assert [s.block_ids for s in again.stores] == [[50, 51, 52, 53], [54, 55, 56, 57]]


def test_a_preempted_request_may_load_as_often_as_a_new_one() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    request = FakeRequest("again", 640)
    for preemptions in range(MOST_LOADS + 2):
        request.num_computed_tokens, request.num_preemptions = 0, preemptions
        assert side.match(request, 0) == 512
        side.plan_load(request, (list(range(20)),), 512)
        side.plan_step(FakeOutput())
        side.apply_report(None, {"again"})
        request.num_computed_tokens = 512
        output = FakeOutput([FakeNew("again", (list(range(20)),), 512)])
        output.num_scheduled_tokens = {"again": 128}
        side.plan_step(output)


def other_loads(side: KVTCScheduler, request: FakeRequest, tokens: int, told: bool) -> StepMetadata:
    """Another connector loads `tokens` tokens of a request, of which 256 are computed then.

    told: it loads between steps, and workers tell its end.
    """
    blocks = list(range(-(-request.num_tokens // BLOCK)))
    assert side.match(request, 0) == 0
    side.plan_load(request, (blocks,), 0)
    if told:
        side.plan_step(FakeOutput())
        side.apply_report(None, {request.request_id})
        request.num_computed_tokens = tokens
        side.plan_load(request, (blocks,), 0)
    output = FakeOutput([FakeNew(request.request_id, (blocks,), tokens)])
    output.num_scheduled_tokens = {request.request_id: 256}
    return side.plan_step(output)


@pytest.mark.parametrize("told", [False, True])
def test_what_another_connector_loaded_is_not_stored(told: bool) -> None:
    """Beside it in a `MultiConnector`: some other engine computed that, nobody knows which."""
    side, pool = scheduler(), FakeBlockPool()
    side.bind_gpu_blocks(pool)
    before = FakeRequest("before", 512, name="before")
    assert len(start(side, before, list(range(16)), 256).stores) == 2
    other = FakeRequest("r", 640, name="other")
    assert other_loads(side, other, 256, told).stores == []
    # Nor what is computed on its blocks, which vLLM's cache has from now on.
    again = FakeRequest("again", 640, name="other")
    assert start(side, again, list(range(20)), 384, local=256).stores == []
    # What the engine computed by itself is: a request that runs, and one that begins at nothing.
    assert len(step(side, before, 256).stores) == 2
    assert len(start(side, FakeRequest("new", 256, name="new"), list(range(8)), 256).stores) == 2
    pool.reset()
    last = FakeRequest("last", 640, name="last")
    assert len(start(side, last, list(range(20)), 384, local=256).stores) == 5


def test_a_block_that_vllm_has_in_part_is_not_another_connector_s() -> None:
    side = scheduler()
    request = FakeRequest("r", 256)
    assert side.match(request, 96) == 0
    side.plan_load(request, (list(range(8)),), 0)
    output = FakeOutput([FakeNew("r", (list(range(8)),), 96 + BLOCK - 1)])
    output.num_scheduled_tokens = {"r": 256 - 96 - BLOCK + 1}
    assert len(side.plan_step(output).stores) == 2


def test_reset_forgets_everything_and_ignores_late_reports() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    pending = start(side, FakeRequest("s", 256, name="b"), list(range(8)), 256)
    side.reset()
    confirm(side, pending)
    assert len(side.index) == 0
    assert not side.has_pending_work()
    assert side.plan_step(FakeOutput()).epoch == 1


def test_all_ranks_must_hold_a_chunk() -> None:
    side = scheduler(ranks=2, recent_window=0)
    request = FakeRequest("r", 257)
    metadata = start(side, request, list(range(9)), 257)
    confirm(side, metadata, rank=0)
    assert side.match(FakeRequest("s", 257), 0) == 0
    confirm(side, metadata, rank=1)
    assert side.match(FakeRequest("s", 257), 0) == 256


def test_hits_are_counted_once_and_resumed_ones_apart() -> None:
    side = scheduler()
    fill(side, FakeRequest("r", 640))
    side.take_stats()
    request = FakeRequest("again", 640)
    tokens = side.match(request, 0)
    side.match(request, 0)
    side.plan_load(request, (list(range(20)),), tokens)
    side.apply_report(None, {"again"})
    resumed = FakeRequest("back", 640, num_preemptions=1)
    side.plan_load(resumed, (list(range(20)),), side.match(resumed, 0))
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["lookup_tokens"] == stats.data["resumed_lookup_tokens"] == 640
    assert stats.data["hit_tokens"] == stats.data["resumed_hit_tokens"] == 512
    assert side.take_stats() is None


def test_budget_below_one_chunk_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory_bytes=2000 is too small for one chunk"):
        scheduler(memory_bytes=2000)


def test_chunks_must_be_whole_blocks() -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens=100 must be a multiple of .* 32"):
        scheduler(chunk_tokens=100)


def test_a_burst_waits_for_neither_more_loads_nor_more_computing_than_it_must() -> None:
    """Prompts that are all stored: some are loaded, one is computed, the others come later."""
    side = scheduler(recent_window=0)
    policy = side._load_policy
    requests = [FakeRequest(f"new {number}", 256, name=f"{number}") for number in range(4)]
    for number, request in enumerate(requests):
        stored = FakeRequest(f"old {number}", 256, name=request.name)
        metadata = start(side, stored, [8 * number + i for i in range(8)], 256)
        confirm(side, metadata)
        side.apply_report(WorkerReport(0, step=metadata.number), None)
    assert {policy.decide(name, 256) for name in "ab"} == {Way.LOAD}  # nothing is known yet
    for _ in range(MIN_SAMPLES):
        policy.observe_loads(Pace(1000, 0.23))
        policy.observe_step(1000, 0.2)
    policy.load_planned("other", 224)
    side.take_stats()
    offered = []
    for request in requests:
        offered.append(side.match(request, 0))
        if offered[-1] is not None:
            side.plan_load(request, (list(range(8)),), offered[-1])
    assert offered == [0, None, 224, None]
    planned = side.plan_step(FakeOutput(num_scheduled_tokens={"new 0": 256}))
    assert [job.request_id for job in planned.loads] == ["new 2"]
    # Behind the load that runs, what is computed and who was put off.
    assert planned.loads[0].patience == pytest.approx(0.2e-3 * (224 + 256 + 224 + 224))
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["gate_waits"] == 2
    assert stats.data["gated_tokens"] == 224
    assert [side.match(request, 0) for request in requests[1::2]] == [0, 0]
