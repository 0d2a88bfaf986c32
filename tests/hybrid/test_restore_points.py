"""Windows: which records a request leaves behind, and at which boundaries it can be resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtc_vllm.config import load_config
from kvtc_vllm.offload.geometry import CacheGeometry
from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.reach import FULL, ChunkedLocal, LastState, Reach, SlidingWindow
from kvtc_vllm.offload.scheduler import MOST_LOADS, KVTCScheduler
from tests.connector.fakes import BLOCK, FakeCached, FakeNew, FakeOutput, FakeRequest, geometry

CHUNK = 4 * BLOCK
"""128 tokens, the default."""
WINDOW = 6 * BLOCK
SLIDING = SlidingWindow(WINDOW)
BOUND = 1000

ONE = geometry().only_group
ALL = replace(ONE, layer_table=(0, 0))


def windowed(reach: Reach) -> CacheGeometry:
    """Full attention in one block table, `reach` in two."""
    return CacheGeometry((ALL, replace(ONE, layer_table=(1, 2), reach=reach)), 1, BLOCK)


def side(reach: Reach = SLIDING, **extra: object) -> KVTCScheduler:
    config = load_config(
        {"codec": "raw", "memory_bytes": "4MiB", "recent_window": 0, "load_gate": False, **extra}
    )
    return KVTCScheduler(config, windowed(reach), [BOUND, BOUND], prompt_only=False)


def tables(tokens: int, held_from: int = 0) -> tuple[list[int], ...]:
    """Three block tables; the windows' hold nothing before block number `held_from`."""
    count = -(-tokens // BLOCK)
    window = [0] * held_from
    return (
        list(range(1, count + 1)),
        window + [1000 + i for i in range(held_from, count)],
        window + [2000 + i for i in range(held_from, count)],
    )


def begin(
    scheduler: KVTCScheduler, request: FakeRequest, scheduled: int | None = None
) -> StepMetadata:
    """The first step of a request, nothing loaded."""
    scheduler.match(request, 0)
    blocks = tables(request.num_tokens)
    scheduler.plan_load(request, blocks, 0)
    tokens = scheduled or request.num_tokens
    new = FakeNew(request.request_id, blocks, 0)  # type: ignore[arg-type]
    step = scheduler.plan_step(FakeOutput([new], num_scheduled_tokens={request.request_id: tokens}))
    request.num_computed_tokens = tokens
    return step


def go_on(scheduler: KVTCScheduler, request: FakeRequest, tokens: int) -> StepMetadata:
    """A later step, whose blocks the request has already."""
    cached = FakeCached([request.request_id], [None], [request.num_computed_tokens])
    step = scheduler.plan_step(
        FakeOutput(scheduled_cached_reqs=cached, num_scheduled_tokens={request.request_id: tokens})
    )
    request.num_computed_tokens += tokens
    return step


def keep(scheduler: KVTCScheduler, step: StepMetadata, *without: bytes) -> None:
    """Workers have stored what a step ordered, except some records."""
    kept = [(item.key, 0, 100) for item in step.stores if item.key not in without]
    lost = [(item.key, 0) for item in step.stores if item.key in without]
    scheduler.apply_report(WorkerReport(0, kept, lost), None)


def chunks_of(step: StepMetadata, group: int) -> list[int]:
    return [item.start // CHUNK for item in step.stores if item.group == group]


@pytest.mark.parametrize(
    ("reach", "end", "first"),
    [
        (FULL, 1000, 0),
        (SlidingWindow(4), 7, 4),  # vLLM's own example
        (SlidingWindow(1000), 7, 0),
        (ChunkedLocal(8), 13, 8),
        (ChunkedLocal(8), 8, 8),
        (ChunkedLocal(8), 7, 0),
        (LastState(), 7, 6),
    ],
)
def test_reach(reach: Reach, end: int, first: int) -> None:
    assert reach.first_needed(end) == first


def test_windows_are_stored_before_the_end_of_the_prompt_only() -> None:
    step = begin(side(), FakeRequest("r", 10 * CHUNK))
    assert chunks_of(step, 0) == list(range(10))
    # The same prompt again goes on at 9 chunks, where a token is left; that needs 191 before.
    assert chunks_of(step, 1) == [7, 8, 9]
    (item,) = [s for s in step.stores if s.group == 1 and s.start == 9 * CHUNK]
    assert item.block_ids == [*range(1036, 1040), *range(2036, 2040)]


def test_a_recent_window_keeps_more_of_them() -> None:
    step = begin(side(recent_window=2 * CHUNK), FakeRequest("r", 10 * CHUNK))
    assert chunks_of(step, 1) == [5, 6, 7, 8, 9]


def test_the_same_prompt_again_is_a_hit() -> None:
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK + 5)
    keep(scheduler, begin(scheduler, request))
    assert scheduler.match(FakeRequest("s", 10 * CHUNK + 5), 0) == 10 * CHUNK
    assert scheduler.match(FakeRequest("t", 10 * CHUNK), 0) == 10 * CHUNK - BLOCK


def test_an_answer_leaves_windows_at_its_end() -> None:
    scheduler, request = side(), FakeRequest("r", 4 * CHUNK)
    keep(scheduler, begin(scheduler, request))
    for _ in range(8 * 4):
        request.grow(request.num_tokens + BLOCK)
        grown = FakeCached(
            [request.request_id],
            [[[500 + request.num_tokens // BLOCK]] * 3],
            [request.num_computed_tokens],
        )
        keep(
            scheduler,
            scheduler.plan_step(FakeOutput([], grown, {request.request_id: BLOCK})),
        )
        request.num_computed_tokens += BLOCK
    assert scheduler.match(FakeRequest("next turn", 12 * CHUNK + 300), 0) == 12 * CHUNK
    # What the answer has left behind was given up, what led to it was not.
    assert scheduler.match(FakeRequest("branch", 8 * CHUNK + 5), 0) == 4 * CHUNK
    assert sum(scheduler.index.is_ready(f"a:{4 * n + 3}\x01".encode()) for n in range(12)) == 3 + 4


def test_a_boundary_counts_only_if_the_window_before_it_is_there() -> None:
    """The last record of the windows is missing, then the one before."""
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK)
    step = begin(scheduler, request)
    windows = [item.key for item in step.stores if item.group == 1]
    keep(scheduler, step, windows[-1])
    assert scheduler.match(FakeRequest("s", 10 * CHUNK + 5), 0) == 9 * CHUNK
    scheduler.apply_report(WorkerReport(0, bad=[windows[-2]]), None)
    assert scheduler.match(FakeRequest("t", 10 * CHUNK + 5), 0) == 0


def test_a_boundary_needs_all_full_attention_before_it() -> None:
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK)
    step = begin(scheduler, request)
    keep(scheduler, step, step.stores[3].key)
    assert step.stores[3].group == 0
    assert scheduler.match(FakeRequest("s", 10 * CHUNK + 5), 0) == 0
    # vLLM's own cache reaches beyond the gap.
    assert scheduler.match(FakeRequest("t", 10 * CHUNK + 5), 4 * CHUNK) == 6 * CHUNK


def test_a_load_fills_all_of_full_attention_and_the_window() -> None:
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK)
    keep(scheduler, begin(scheduler, request))
    asking = FakeRequest("s", 10 * CHUNK + 5)
    assert scheduler.match(asking, 2 * CHUNK) == 8 * CHUNK
    # 10 x 128 - 191 = 1089, in block number 34.
    scheduler.plan_load(asking, tables(10 * CHUNK, held_from=34), 8 * CHUNK)
    (job,) = scheduler.plan_step(FakeOutput()).loads
    assert job.fits
    full = [item for item in job.items if item.group == 0]
    assert [item.start for item in full] == [n * CHUNK for n in range(2, 10)]
    windows = [(i.start // CHUNK, i.first_block, i.block_ids) for i in job.items if i.group == 1]
    assert windows == [
        (8, 2, [1034, 1035, 2034, 2035]),
        (9, 0, [1036, 1037, 1038, 1039, 2036, 2037, 2038, 2039]),
    ]


@pytest.mark.parametrize("held_from", [33, 35])
def test_blocks_that_the_records_do_not_fill_fail_the_load(held_from: int) -> None:
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK)
    keep(scheduler, begin(scheduler, request))
    asking = FakeRequest("s", 10 * CHUNK + 5)
    scheduler.match(asking, 0)
    scheduler.plan_load(asking, tables(10 * CHUNK, held_from), 10 * CHUNK)
    (job,) = scheduler.plan_step(FakeOutput()).loads
    assert not job.fits


def test_a_request_whose_loads_fail_again_and_again_is_computed() -> None:
    scheduler, request = side(), FakeRequest("r", 10 * CHUNK)
    keep(scheduler, begin(scheduler, request))
    asking = FakeRequest("s", 10 * CHUNK + 5)
    for _ in range(MOST_LOADS):
        assert scheduler.match(asking, 0) == 10 * CHUNK
        scheduler.plan_load(asking, tables(10 * CHUNK, 34), 10 * CHUNK)
        scheduler.apply_report(None, {"s"})
    assert scheduler.match(asking, 0) == 0


def test_blocks_that_the_window_has_left_are_not_stored() -> None:
    """A window of two blocks, chunks of four: in small steps the first blocks are gone."""
    scheduler, request = side(SlidingWindow(2 * BLOCK)), FakeRequest("r", 2 * CHUNK)
    begin(scheduler, request, BLOCK)
    steps = [go_on(scheduler, request, BLOCK) for _ in range(7)]
    assert [chunks_of(step, 0) for step in steps if step.stores] == [[0], [1]]
    assert not any(chunks_of(step, 1) for step in steps)


def test_prefixes_that_part_leave_windows_where_they_part() -> None:
    """The third request with the same beginning goes on behind it."""
    scheduler = side()
    keep(scheduler, begin(scheduler, FakeRequest("a", 20 * CHUNK)))
    second, third = FakeRequest("b", 20 * CHUNK), FakeRequest("c", 20 * CHUNK)
    for other in (second, third):
        own = [f"{other.request_id}:{i}".encode() for i in range(20 * 4)]
        other.block_hashes[8 * 4 :] = own[8 * 4 :]
    step = begin(scheduler, second)
    assert chunks_of(step, 0) == list(range(8, 20))
    assert chunks_of(step, 1) == [6, 7, 17, 18, 19]
    keep(scheduler, step)
    assert scheduler.match(third, 0) == 8 * CHUNK


def test_local_chunks_need_nothing_where_one_begins() -> None:
    scheduler = side(ChunkedLocal(4 * CHUNK))
    step = begin(scheduler, FakeRequest("r", 8 * CHUNK))
    assert chunks_of(step, 1) == [4, 5, 6, 7]
    keep(scheduler, step, *(item.key for item in step.stores if item.group == 1))
    asking = FakeRequest("s", 8 * CHUNK + 5)
    assert scheduler.match(asking, 0) == 8 * CHUNK
    scheduler.plan_load(asking, tables(8 * CHUNK, held_from=32), 8 * CHUNK)
    (job,) = scheduler.plan_step(FakeOutput()).loads
    assert job.fits
    assert {item.group for item in job.items} == {0}
    scheduler.apply_report(None, {"s"})
    # At 7 chunks the local chunk that began at 4 is needed.
    assert scheduler.match(FakeRequest("t", 7 * CHUNK + 5), 0) == 4 * CHUNK


def test_windows_alone_need_no_more_than_the_window() -> None:
    group = replace(ONE, reach=SlidingWindow(WINDOW))
    config = load_config({"codec": "raw", "memory_bytes": "4MiB", "recent_window": 0})
    scheduler = KVTCScheduler(config, CacheGeometry((group,), 1), [BOUND], prompt_only=False)
    request = FakeRequest("r", 10 * CHUNK)
    scheduler.match(request, 0)
    scheduler.plan_load(request, tables(10 * CHUNK)[:1], 0)
    new = FakeNew("r", tables(10 * CHUNK)[:1], 0)  # type: ignore[arg-type]
    step = scheduler.plan_step(FakeOutput([new], num_scheduled_tokens={"r": 10 * CHUNK}))
    assert chunks_of(step, 0) == [7, 8, 9]
    keep(scheduler, step)
    assert scheduler.match(FakeRequest("s", 10 * CHUNK + 5), 0) == 10 * CHUNK


def test_hashes_finer_than_blocks() -> None:
    """Blocks of two hashes in both groups, as where a third kind of layer has smaller ones."""
    big = replace(ALL, block_size=2 * BLOCK)
    window = replace(big, layer_table=(1, 1), reach=SlidingWindow(WINDOW))
    config = load_config({"codec": "raw", "memory_bytes": "4MiB", "recent_window": 0})
    cache = CacheGeometry((big, window), 1, BLOCK)
    scheduler = KVTCScheduler(config, cache, [BOUND, BOUND], prompt_only=False)
    request = FakeRequest("r", 4 * CHUNK)
    scheduler.match(request, 0)
    blocks = (list(range(1, 9)), list(range(11, 19)))
    scheduler.plan_load(request, blocks, 0)
    new = FakeNew("r", blocks, 0)  # type: ignore[arg-type]
    step = scheduler.plan_step(FakeOutput([new], num_scheduled_tokens={"r": 4 * CHUNK}))
    assert [(s.key, s.block_ids) for s in step.stores if s.group == 0] == [
        (b"a:3", [1, 2]),
        (b"a:7", [3, 4]),
        (b"a:11", [5, 6]),
        (b"a:15", [7, 8]),
    ]
    keep(scheduler, step)
    # A token is left, and vLLM goes on at whole blocks.
    assert scheduler.match(FakeRequest("s", 4 * CHUNK), 0) == 4 * CHUNK - 2 * BLOCK


STATES = CacheGeometry(
    (
        replace(ALL, block_size=CHUNK),
        replace(
            ONE,
            block_size=CHUNK,
            num_kv_heads=0,
            head_size=0,
            head_size_v=0,
            layer_table=(1, 2),
            reach=LastState(),
            state_bytes=100,
        ),
    ),
    1,
    BLOCK,
)


def of_states(window: int = 0) -> KVTCScheduler:
    config = load_config(
        {"codec": "raw", "memory_bytes": "4MiB", "recent_window": window, "load_gate": False}
    )
    return KVTCScheduler(config, STATES, [BOUND, BOUND], prompt_only=False)


def prefill(scheduler: KVTCScheduler, request: FakeRequest, *ends: int) -> list[StepMetadata]:
    """A prompt in steps that end at these chunks, then at its end; all is stored."""
    blocks = tuple([list(range(n, n + 20)) for n in (100, 200, 300)])
    scheduler.match(request, 0)
    scheduler.plan_load(request, blocks, 0)
    steps = []
    for end in (*(chunk * CHUNK for chunk in ends), request.num_tokens):
        new = FakeNew(request.request_id, blocks, 0)  # type: ignore[arg-type]
        tokens = end - request.num_computed_tokens
        if not request.num_computed_tokens:
            step = scheduler.plan_step(
                FakeOutput([new], num_scheduled_tokens={request.request_id: tokens})
            )
            request.num_computed_tokens = tokens
        else:
            step = go_on(scheduler, request, tokens)
        keep(scheduler, step)
        steps.append(step)
    return steps


def test_states_are_stored_where_a_step_ends_before_the_end_of_the_prompt() -> None:
    scheduler = of_states()
    steps = prefill(scheduler, FakeRequest("r", 8 * CHUNK + 5), 3, 8)
    assert [chunks_of(step, 0) for step in steps] == [[0, 1, 2], [3, 4, 5, 6, 7], []]
    assert [chunks_of(step, 1) for step in steps] == [[], [7], []]
    (item,) = [item for step in steps for item in step.stores if item.group == 1]
    assert item.block_ids == [207, 307]


def test_states_restore_only_their_own_boundary() -> None:
    scheduler = of_states()
    prefill(scheduler, FakeRequest("r", 8 * CHUNK + 5), 8)
    assert scheduler.match(FakeRequest("longer", 10 * CHUNK), 0) == 8 * CHUNK
    # vLLM computes the last token again, on a state that must not have seen it.
    assert scheduler.match(FakeRequest("shorter", 8 * CHUNK), 0) == 0
    asking = FakeRequest("s", 8 * CHUNK + 5)
    assert scheduler.match(asking, 2 * CHUNK) == 6 * CHUNK
    blocks = (list(range(1, 9)), [0] * 7 + [20], [0] * 7 + [30])
    scheduler.plan_load(asking, blocks, 6 * CHUNK)
    (job,) = scheduler.plan_step(FakeOutput()).loads
    assert job.fits
    assert [(i.start // CHUNK, i.block_ids) for i in job.items if i.group == 1] == [(7, [20, 30])]
    assert len([item for item in job.items if item.group == 0]) == 6


def test_states_in_the_recent_window_are_better_than_no_hit() -> None:
    scheduler = of_states(window=128)
    prefill(scheduler, FakeRequest("r", 8 * CHUNK + 5), 8)
    asking = FakeRequest("s", 8 * CHUNK + 5)
    assert scheduler.match(asking, 0) == 8 * CHUNK
    blocks = (list(range(1, 9)), [0] * 7 + [20], [0] * 7 + [30])
    scheduler.plan_load(asking, blocks, 8 * CHUNK)
    stats = scheduler.take_stats()
    assert stats is not None
    assert stats.data["short_window_loads"] == 1
    scheduler.apply_report(None, {"s"})

    # With a state shortly before it, the recent window is computed.
    scheduler = of_states(window=128)
    prefill(scheduler, FakeRequest("r", 8 * CHUNK + 5), 7, 8)
    assert scheduler.match(FakeRequest("s", 8 * CHUNK + 5), 0) == 7 * CHUNK
