"""Waiting for disk, on the scheduler's side alone: who waits, how long, what is pinned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.pace import Pace
from kvtc_vllm.offload.promotion import Promotions
from kvtc_vllm.offload.read_queue import PROBE_EVERY
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.tiers.disk_index import DiskIndex
from kvtc_vllm.tiers.index import TierIndex
from kvtc_vllm.tiers.policies import REGISTRY
from tests.connector.fakes import FakeOutput, FakeRequest, confirm, fill, scheduler, start, step

KEYS = [b"0", b"1", b"2", b"3"]


class Rig:
    """Both indexes, a clock that stands still, chunks of 100 bytes on disk."""

    def __init__(self, capacity: int = 1000, ranks: int = 1, on_disk: int = 4) -> None:
        self.now = 0.0
        self.worth = math.inf
        self.memory = TierIndex(capacity * ranks, ranks, REGISTRY["lru"](capacity * ranks))
        self.disk = DiskIndex(10**6, ranks, REGISTRY["lru"](10**6))
        self.promotions = Promotions(
            self.memory, self.disk, 2.0, lambda tokens: self.worth, clock=lambda: self.now
        )
        for key in KEYS[:on_disk]:
            for rank in range(ranks):
                self.disk.add(key, rank, 100)

    def wait(self, request: str, keys: list[bytes] = KEYS) -> bool:
        return self.promotions.must_wait(request, keys)

    def put(self, key: bytes, size: int = 100) -> None:
        assert self.memory.reserve(key, size)
        self.memory.commit(key, 0, size)

    def arrive(self, *keys: bytes) -> None:
        for key in keys:
            self.memory.commit(key, 0, 90)

    def crowd_out(self) -> list[bytes]:
        """Evict all that may be evicted; returns it."""
        self.memory.take_evicted()
        crowd = []
        while self.memory.reserve(b"crowd %d" % len(crowd), 100):
            crowd.append(b"crowd %d" % len(crowd))
        for key in crowd:
            self.memory.abandon(key, 0)
        return [key for key in self.memory.take_evicted() if key not in crowd]


def test_a_request_waits_until_all_its_chunks_arrived() -> None:
    rig = Rig()
    assert rig.wait("a")
    assert rig.promotions.take_orders() == KEYS
    assert rig.promotions.take_orders() == []
    rig.arrive(*KEYS[:3])
    assert rig.wait("a")
    rig.arrive(KEYS[3])
    assert not rig.wait("a")
    assert not rig.wait("a")  # asked again: vLLM had no blocks
    assert rig.promotions.expired == 0


def test_a_request_without_chunks_on_disk_never_waits() -> None:
    rig = Rig(on_disk=0)
    assert not rig.wait("a")
    assert not Rig().wait("b", [])
    assert rig.promotions.take_orders() == []


def test_only_the_run_from_the_start_is_read() -> None:
    rig = Rig()
    rig.disk.lose(KEYS[1])
    assert rig.wait("a")
    assert rig.promotions.take_orders() == KEYS[:1]


def test_the_deadline_ends_the_wait_and_late_chunks_still_arrive() -> None:
    rig = Rig()
    assert rig.wait("a")
    rig.arrive(KEYS[0])
    rig.now = 1.99
    assert rig.wait("a")
    rig.now = 2.0
    assert not rig.wait("a")
    assert rig.promotions.expired == 1
    assert rig.memory.is_ready(KEYS[0])
    rig.arrive(*KEYS[1:])
    assert all(rig.memory.is_ready(key) for key in KEYS)


def test_arriving_exactly_at_the_deadline_is_in_time() -> None:
    rig = Rig()
    assert rig.wait("a")
    rig.arrive(*KEYS)
    rig.now = 99.0
    assert not rig.wait("a")
    assert rig.promotions.expired == 0


@pytest.mark.parametrize(("now", "expired"), [(1.0, 0), (2.0, 1)])
def test_a_read_given_up_at_the_deadline_counts_as_a_wait_that_expired(
    now: float, expired: int
) -> None:
    rig = Rig()
    assert rig.wait("a")
    rig.arrive(*KEYS[:3])
    rig.now = now
    rig.memory.abandon(KEYS[3], 0)  # the worker's deadline, known before the request is asked
    assert not rig.wait("a")
    assert rig.promotions.expired == expired


def test_what_a_request_waits_for_and_found_is_pinned_until_it_is_scheduled() -> None:
    rig = Rig()
    rig.put(KEYS[0])
    rig.put(KEYS[2])  # in memory, but behind a gap
    assert rig.wait("a")
    assert rig.promotions.take_orders() == [KEYS[1], KEYS[3]]
    assert not set(rig.crowd_out()) & set(KEYS)
    rig.arrive(KEYS[1], KEYS[3])
    assert not rig.wait("a")
    assert not set(rig.crowd_out()) & set(KEYS)
    rig.promotions.forget("a")
    assert set(rig.crowd_out()) >= set(KEYS[:2])


def test_a_chunk_that_arrives_early_is_pinned_while_the_others_come() -> None:
    rig = Rig(capacity=500)
    assert rig.wait("a")
    rig.arrive(KEYS[0])
    assert rig.wait("a")
    assert KEYS[0] not in rig.crowd_out()


@pytest.mark.parametrize("arrived", [0, 2, 4])
def test_an_aborted_request_leaves_nothing_pinned(arrived: int) -> None:
    rig = Rig(capacity=400)
    assert rig.wait("a")
    rig.arrive(*KEYS[:arrived])
    rig.wait("a")
    rig.promotions.forget("a")
    rig.promotions.forget("a")
    rig.arrive(*KEYS[arrived:])
    assert sorted(rig.crowd_out()) == KEYS


def test_a_memory_that_is_too_small_takes_the_first_chunks() -> None:
    rig = Rig(capacity=250)
    assert rig.wait("a")
    assert rig.promotions.take_orders() == KEYS[:2]
    rig.arrive(*KEYS[:2])
    assert not rig.wait("a")
    full = Rig(capacity=250)
    for key in (b"x", b"y"):
        full.put(key)
    full.memory.pin([b"x", b"y"])
    assert not full.wait("a")


def test_two_requests_wait_for_one_read() -> None:
    rig = Rig()
    assert rig.wait("a")
    assert rig.promotions.take_orders() == KEYS
    rig.now = 1.0
    assert rig.wait("b", KEYS[:2])
    assert rig.promotions.take_orders() == []
    rig.promotions.forget("a")  # aborted: the other still gets its chunks
    rig.arrive(*KEYS[:2])
    assert not rig.wait("b", KEYS[:2])
    assert KEYS[0] not in rig.crowd_out()
    rig.now = 3.0
    assert rig.wait("c", KEYS[2:])  # each has a deadline of its own
    assert rig.promotions.expired == 0


def test_a_chunk_lost_meanwhile_ends_the_wait() -> None:
    rig = Rig(ranks=2)
    assert rig.wait("a")
    rig.memory.abandon(KEYS[0], 0)
    assert rig.wait("a")  # the other rank has not answered
    for key in KEYS:
        rig.memory.commit(key, 1, 90)
    for key in KEYS[1:]:
        rig.memory.commit(key, 0, 90)
    assert not rig.wait("a")
    assert not rig.memory.is_known(KEYS[0])
    assert rig.memory.is_ready(KEYS[1])


def test_a_reset_while_waiting_ends_the_wait_without_a_trace() -> None:
    rig = Rig()
    rig.put(KEYS[0])
    assert rig.wait("a")
    rig.memory.clear()
    rig.disk.clear()
    rig.promotions.clear()
    assert rig.promotions.take_orders() == []
    assert not rig.wait("a")
    rig.put(KEYS[0])
    rig.promotions.forget("a")
    assert rig.memory.pin([KEYS[0]]) == [KEYS[0]]


def test_nothing_is_remembered_of_chunks_whose_requests_went() -> None:
    rig = Rig()
    assert rig.wait("a")
    rig.promotions.forget("a")
    rig.arrive(*KEYS)
    rig.promotions.reported(KEYS)
    assert not rig.promotions._reading


# ------------------------------------------------------------- through the scheduler


def with_disk(tmp_path: Path, chunks: int = 2, **extra: Any) -> KVTCScheduler:
    """A scheduler that starts with the first chunks of prompt "a" on disk."""
    side = scheduler(disk_path=str(tmp_path), recent_window=0, load_gate=False, **extra)
    side.restore({0: [(b"a:%d" % (4 * i + 3), 4096) for i in range(chunks)]})
    return side


def report(side: KVTCScheduler, epoch: int = 0, **news: Any) -> None:
    side.apply_report(WorkerReport(epoch, **news), None)


def test_match_says_later_and_then_what_arrived(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    assert side.match(request, 0) is None
    assert side.match(request, 0) is None
    metadata = side.plan_step(FakeOutput())
    assert metadata.promote == [b"a:3", b"a:7"]
    assert metadata.idle
    report(side, stored=[(b"a:3", 0, 1000), (b"a:7", 0, 1000)])
    assert side.match(request, 0) == 256
    side.plan_load(request, (list(range(10)),), 256)
    (job,) = side.plan_step(FakeOutput()).loads
    assert [item.key for item in job.items] == [b"a:3", b"a:7"]


def test_what_is_on_disk_and_used_is_touched_head_last(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    side.match(request, 0)
    report(side, stored=[(b"a:3", 0, 1000), (b"a:7", 0, 1000)])
    side.plan_load(request, (list(range(10)),), side.match(request, 0) or 0)
    assert side.plan_step(FakeOutput()).touch == [b"a:7", b"a:3"]


def test_a_failed_read_is_a_miss_and_is_not_read_again(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    assert side.match(request, 0) is None
    side.plan_step(FakeOutput())
    report(side, stored=[(b"a:7", 0, 1000)], dropped=[(b"a:3", 0)], disk_lost=[b"a:3"])
    assert side.match(request, 0) == 0
    assert side.plan_step(FakeOutput()).disk_remove == [b"a:3"]
    assert side.match(FakeRequest("next", 300), 0) == 0


def test_a_preempted_request_may_wait_again(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    side.match(request, 0)
    report(side, dropped=[(b"a:3", 0), (b"a:7", 0)])  # a slow disk: still there
    assert side.match(request, 0) == 0
    start_step = start(side, request, list(range(10)), 300)
    assert [item.key for item in start_step.stores] == [b"a:3", b"a:7"]
    report(side, dropped=[(item.key, 0) for item in start_step.stores])
    request.num_computed_tokens = 0
    request.num_preemptions = 1
    assert side.match(request, 0) is None
    assert side.plan_step(FakeOutput()).promote == [b"a:3", b"a:7"]
    report(side, stored=[(b"a:3", 0, 1000), (b"a:7", 0, 1000)])
    assert side.match(request, 0) == 256


def test_an_aborted_request_frees_the_chunks_it_waited_for(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    assert side.match(request, 0) is None
    side.finish(request)
    side.plan_step(FakeOutput(finished_req_ids={"r"}))
    report(side, stored=[(b"a:3", 0, 1000), (b"a:7", 0, 1000)])
    assert not side.has_pending_work()
    fill(side, FakeRequest("big", 128 * 300, name="b"))
    assert not side.index.is_known(b"a:3")


def test_demotion_writes_what_made_room_and_nothing_else(tmp_path: Path) -> None:
    side = with_disk(tmp_path, disk_write="behind", memory_bytes=4 * 6000)
    fill(side, FakeRequest("b", 256, name="b"))
    request = FakeRequest("c", 128, name="c")
    metadata = start(side, request, list(range(4)), 128)
    report(side, dropped=[(item.key, 0) for item in metadata.stores])  # its encoding failed
    assert side.plan_step(FakeOutput()).demote == []
    metadata = start(side, FakeRequest("d", 512, name="d"), list(range(16)), 512)
    assert set(metadata.evict) >= set(metadata.demote)
    assert b"b:7" in metadata.demote


def test_a_chunk_that_was_bad_is_not_demoted_but_its_successor_is(tmp_path: Path) -> None:
    side = with_disk(tmp_path, chunks=0, disk_write="behind")
    fill(side, FakeRequest("b", 256, name="b"))
    report(side, bad=[b"b:3"])
    metadata = side.plan_step(FakeOutput())
    assert (metadata.evict, metadata.demote) == ([b"b:3"], [])
    fill(side, FakeRequest("again", 128, name="b"))
    metadata = start(side, FakeRequest("big", 128 * 300, name="c"), list(range(1200)), 128 * 300)
    assert b"b:3" in metadata.demote


def test_a_load_that_found_nothing_in_memory_keeps_the_chunk_on_disk(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    report(side, bad=[b"a:3"])
    assert side.match(FakeRequest("r", 300), 0) is None
    report(side, disk_lost=[b"a:3"])
    assert not side.disk.is_ready(b"a:3")  # type: ignore[union-attr]


def test_reset_forgets_the_disk_and_keeps_the_engine_awake_to_say_so(tmp_path: Path) -> None:
    side = with_disk(tmp_path)
    request = FakeRequest("r", 300)
    assert side.match(request, 0) is None
    side.reset()
    assert side.has_pending_work()
    metadata = side.plan_step(FakeOutput())
    assert (metadata.epoch, metadata.promote, metadata.touch) == (1, [], [])
    assert not side.has_pending_work()
    # Reports of before the reset change nothing.
    report(side, disk_stored=[(b"a:3", 0, 4096)], stored=[(b"a:3", 0, 1000)])
    assert side.match(request, 0) == 0
    assert len(side.disk or ()) == 0


def test_a_load_of_before_a_reset_does_not_unpin_what_came_after() -> None:
    side = scheduler(recent_window=0)
    fill(side, FakeRequest("r", 257))
    old = FakeRequest("old", 257)
    side.plan_load(old, (list(range(9)),), side.match(old, 0) or 0)
    side.reset()
    fill(side, FakeRequest("s", 257))
    new = FakeRequest("new", 257)
    side.plan_load(new, (list(range(9)),), side.match(new, 0) or 0)
    side.apply_report(None, {"old"})
    metadata = start(side, FakeRequest("big", 128 * 300, name="b"), list(range(1200)), 128 * 300)
    assert not {b"a:3", b"a:7"} & set(metadata.evict)


def test_a_prefix_is_stored_from_its_second_request_on_and_preemption_does_not_count() -> None:
    side = scheduler(store_threshold=2)
    first = FakeRequest("r", 256)
    assert start(side, first, list(range(8)), 256).stores == []
    first.num_computed_tokens, first.num_preemptions = 0, 1
    assert side.match(first, 0) == 0
    side.plan_load(first, (list(range(8)),), 0)
    again = step(side, first, 256, resumed=True, new_blocks=(list(range(8)),))
    assert again.stores == []
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["unadmitted_chunks"] == 2
    second = FakeRequest("s", 256)
    metadata = start(side, second, list(range(8)), 256)
    assert len(metadata.stores) == 2
    report(side, dropped=[(item.key, 0) for item in metadata.stores])
    assert len(start(side, FakeRequest("t", 256), list(range(8)), 256).stores) == 2


def test_disk_counters_and_gauges(tmp_path: Path) -> None:
    side = with_disk(tmp_path, chunks=3, disk_bytes=1 << 20, load_deadline=0.01)
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["disk_chunks"] == 3
    assert stats.data["disk_used_bytes"] == 3 * 4096
    assert stats.data["disk_capacity_bytes"] == 1 << 20
    request = FakeRequest("r", 500)
    assert side.match(request, 0) is None
    ends = False
    while not ends:
        ends = side.match(request, 0) is not None
    report(side, disk_stored=[(b"x%d" % i, 0, 4096) for i in range(300)])
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["expired_waits"] == 1
    assert stats.data["disk_evicted_chunks"] == 303 - stats.data["disk_chunks"]
    assert stats.data["disk_used_bytes"] < 1 << 20


def test_time_is_taken_from_the_step_that_a_report_names() -> None:
    """Asynchronous scheduling plans a step before the results of the last one are here."""
    side = scheduler()
    samples: list[tuple[int, float]] = []
    side._load_policy.observe_step = lambda tokens, seconds: samples.append((tokens, seconds))  # type: ignore[method-assign]
    requests = [FakeRequest(str(i), 128 * (i + 1), name=str(i)) for i in range(3)]
    planned: list[StepMetadata] = [start(side, r, list(range(16)), r.num_tokens) for r in requests]
    empty = side.plan_step(FakeOutput())
    assert empty.number == 4
    assert empty.tokens == 0
    for metadata in planned[:2]:
        side.apply_report(WorkerReport(0, step=metadata.number), None)
    side.apply_report(None, None)
    side.apply_report(WorkerReport(0, step=empty.number), None)
    assert [tokens for tokens, _ in samples] == [128, 256]  # the third's time is not known
    confirm(side, planned[0])
    assert not side._load_policy._steps


def test_a_waiting_request_is_looked_up_only_when_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked about in every step, and so are hundreds of others."""
    side = with_disk(tmp_path)
    waiters = [FakeRequest(f"r{number}", 300) for number in range(5)]
    assert [side.match(request, 0) for request in waiters] == [None] * 5
    lookups: list[str] = []
    chunks = side._lookup.chunks
    monkeypatch.setattr(
        side._lookup, "chunks", lambda r, a: lookups.append(r.request_id) or chunks(r, a)
    )
    for _ in range(9):
        assert [side.match(request, 0) for request in waiters] == [None] * 5
    report(side, stored=[(b"a:3", 0, 1000)])
    assert [side.match(request, 0) for request in waiters] == [None] * 5
    assert lookups == []
    report(side, stored=[(b"a:7", 0, 1000)])
    assert [side.match(request, 0) for request in waiters] == [256] * 5
    assert len(lookups) == 5


def test_a_request_that_waits_for_anothers_load_is_not_looked_up_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = scheduler(recent_window=0, load_gate=False)
    fill(side, FakeRequest("r", 257))
    first, second = FakeRequest("first", 257), FakeRequest("second", 257)
    side.plan_load(first, (list(range(9)),), side.match(first, 0) or 0)
    assert side.match(second, 0) is None
    with monkeypatch.context() as patched:
        patched.setattr(side._lookup, "chunks", None)
        assert side.match(second, 0) is None
    side.apply_report(None, {"first"})
    assert side.match(second, 0) == 256


def test_waiting_ends_at_the_deadline_without_a_report() -> None:
    rig = Rig()
    assert not rig.promotions.is_waiting("a")
    assert rig.wait("a")
    assert rig.promotions.is_waiting("a")
    rig.now = 2.0
    assert not rig.promotions.is_waiting("a")
    assert not rig.wait("a")
    assert not rig.promotions.is_waiting("a")


def test_a_report_pins_for_those_who_wait_and_for_nobody_who_went() -> None:
    rig = Rig(capacity=500)
    for name in ("a", "b"):
        assert rig.wait(name)
    rig.promotions.forget("a")
    rig.arrive(KEYS[0])
    rig.promotions.reported(KEYS[:1])
    assert KEYS[0] not in rig.crowd_out()
    rig.promotions.forget("b")
    assert KEYS[0] in rig.crowd_out()
    assert rig.memory._pins == {}


def test_a_file_that_says_it_is_larger_than_memory_evicts_nothing_and_is_forgotten() -> None:
    rig = Rig()
    for key in (b"x", b"y"):
        rig.put(key)
    rig.disk.add(KEYS[0], 0, 5000)
    assert not rig.wait("a")
    assert rig.memory.is_ready(b"x")
    assert rig.memory.is_ready(b"y")
    assert not rig.disk.is_ready(KEYS[0])
    assert rig.disk.take_removed() == [KEYS[0]]


def test_nobody_waits_longer_for_disk_than_for_its_recomputation() -> None:
    rig = Rig()
    rig.worth = 0.5
    assert rig.wait("a")
    rig.now = 0.4
    assert rig.wait("a")
    assert rig.promotions.is_waiting("a")
    rig.now = 0.6
    assert not rig.promotions.is_waiting("a")
    assert not rig.wait("a")
    assert rig.promotions.expired == 1


def test_nothing_is_read_where_that_is_expected_to_take_longer_than_recomputing() -> None:
    rig = Rig()
    rig.worth = 0.5
    rig.promotions.reads.observe(Pace(10, 1.5))  # .15 for each, .6 for all
    assert not rig.wait("a")
    assert rig.promotions.take_orders() == []
    assert rig.promotions.refused == 1
    assert rig.promotions.expired == 0
    assert rig.wait("b", KEYS[:3])
    assert rig.promotions.take_orders() == KEYS[:3]
    assert not rig.wait("c")  # behind these
    rig.worth = 0.7
    assert rig.wait("d")  # which are read once for both


def test_what_is_in_memory_waits_for_no_slow_disk() -> None:
    rig = Rig(on_disk=0)
    rig.put(KEYS[0])
    rig.worth = 0.5
    rig.promotions.reads.observe(Pace(1, 9.0))
    assert not rig.wait("a")
    assert rig.promotions.refused == 0
    rig.disk.add(KEYS[1], 0, 100)
    assert not rig.wait("b")
    assert rig.promotions.refused == 1
    assert KEYS[0] not in rig.crowd_out()  # what is there is kept for it


def test_a_read_that_hangs_is_learnt_from_and_a_disk_that_recovers_is_noticed() -> None:
    rig = Rig()
    rig.worth = 0.5
    for seconds in (29.0, 30.0):
        rig.promotions.reads.observe(Pace(running=1, running_seconds=seconds))
    waits = [rig.wait(str(number)) for number in range(PROBE_EVERY)]
    assert waits == [False] * (PROBE_EVERY - 1) + [True]
    rig.promotions.reads.observe(Pace(4, 0.04))
    rig.arrive(*KEYS)
    rig.disk.add(b"4", 0, 100)
    assert rig.wait("next", [b"4"])


def test_the_tokens_that_lack_count_against_the_disk() -> None:
    asked: list[int] = []
    rig = Rig()
    rig.promotions._worth_waiting = lambda tokens: asked.append(tokens) or 1.0  # type: ignore[func-returns-value]
    rig.put(KEYS[0])
    rig.promotions.must_wait("a", KEYS, 400)
    assert asked == [300]
