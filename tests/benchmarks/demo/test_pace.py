"""How many conversations the demo holds."""

from __future__ import annotations

import pytest

from benchmarks.demo import documents, pace
from benchmarks.demo.__main__ import RUNS


@pytest.mark.parametrize(
    ("first_turn", "start", "count"),
    [
        (2.0, 20.0, pace.MOST),
        (7.0, 25.0, 5),
        (8.5, 30.0, 4),
        (10.0, 50.0, pace.FEWEST),
        (100.0, 200.0, pace.FEWEST),
    ],
)
def test_slower_machines_hold_fewer_conversations(
    first_turn: float, start: float, count: int
) -> None:
    assert pace.affordable(first_turn, start, turns=3) == count


def test_more_turns_leave_time_for_fewer_conversations() -> None:
    counts = [
        pace.affordable(8.0, 20.0, turns)
        for turns in range(documents.FEWEST_TURNS, documents.MOST_TURNS + 1)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_fewer_conversations_are_chosen_where_more_would_take_too_long() -> None:
    for first_turn in (5.0, 6.0, 7.0, 8.0):
        count = pace.affordable(first_turn, 25.0, 3)
        assert pace.expected_seconds(count, first_turn, 25.0, 3) <= pace.MOST_SECONDS
        assert count == pace.MOST or (
            pace.expected_seconds(count + 1, first_turn, 25.0, 3) > pace.MOST_SECONDS
        )


def test_the_conversation_that_is_timed_is_like_those_held_and_not_one_of_them() -> None:
    held = documents.TOPICS[: pace.MOST]
    timed = documents.TOPICS[pace.TIMED]
    assert timed not in held
    mean = sum(len(documents.page(topic)) for topic in held) / len(held)
    assert len(documents.page(timed)) == pytest.approx(mean, rel=0.1)


def test_every_run_of_the_demo_counts() -> None:
    assert len(RUNS) == pace.COMPUTED_RUNS + pace.RELOADED_RUNS
