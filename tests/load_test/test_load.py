"""Load on fake servers: order of messages, pairing, figures, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvtc_vllm.load_test.client import Answer, Server
from kvtc_vllm.load_test.conversation import Conversation, Turn
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.metrics_page import increase, parse
from kvtc_vllm.load_test.runner import Request
from kvtc_vllm.load_test.session import measure
from kvtc_vllm.load_test.summary import busy_seconds, compared, percentile, summary
from tests.load_test.fake_server import FakeServer

TALK = [Conversation((Turn("one two", 4), Turn("three", 4)), system="be kind")] * 3


def load(fakes: list[FakeServer], talk: list[Conversation], clients: int, **more: Any) -> Any:
    async def go() -> Any:
        if len(fakes) == 1:
            async with fakes[0].serving() as url:
                return await measure([Server(url)], talk, clients, **more)
        async with fakes[0].serving() as first, fakes[1].serving() as second:
            return await measure([Server(first), Server(second)], talk, clients, **more)

    return asyncio.run(go())


def test_turns_follow_each_other_with_the_server_s_answers() -> None:
    fake = FakeServer()
    result = load([fake], TALK, clients=1)
    assert len(fake.messages) == 6
    assert [m["content"] for m in fake.messages[1]] == ["be kind", "one two", "yes it is ", "three"]
    assert fake.bodies[0]["max_tokens"] == 4
    assert fake.bodies[0]["temperature"] == 0
    (server,) = result["servers"]
    assert (server["completed"], server["failed"]) == (6, 0)
    # Words: 2 + 2 in a first turn, 3 + 1 more in a second.
    assert server["total_input_tokens"] == 3 * (4 + 8) == server["metrics"]["prompt_tokens"]
    assert server["total_output_tokens"] == 18
    assert server["metrics"]["tier_hit_tokens"] == 3 * (2 + 7)
    assert server["metrics"]["hit_rate"] == 27 / 36


def test_no_more_clients_at_once_than_asked_for_and_no_fewer() -> None:
    fake = FakeServer(delay=0.02)
    load([fake], TALK * 3, clients=4)
    assert fake.most_running == 4


def test_latencies_are_those_of_the_server() -> None:
    result = load([FakeServer(delay=0.05)], TALK[:1], clients=1)
    for row in result["requests"]:
        assert row["ttft_ms"] >= 50
        assert row["e2el_ms"] >= 150
    server = result["servers"][0]
    assert server["median_itl_ms"] >= 45
    assert server["median_tpot_ms"] >= 45


def test_two_servers_get_the_same_messages_in_changing_order() -> None:
    fakes = [FakeServer("yes"), FakeServer("no")]
    result = load(fakes, TALK, clients=2)
    assert sorted(map(str, fakes[0].messages)) == sorted(map(str, fakes[1].messages))
    assert result["paired"]["equal_answers"] == 0
    assert result["paired"]["turns"] == 6
    assert len(result["paired"]["ttft_ratio"]) == 3
    assert load([FakeServer(), FakeServer()], TALK, clients=2)["paired"]["equal_answers"] == 1


def test_a_failed_turn_is_counted_and_ends_its_conversation() -> None:
    fake = FakeServer()
    fake.fail_at = 0
    result = load([fake], TALK, clients=1)
    server = result["servers"][0]
    assert (server["completed"], server["failed"]) == (4, 1)
    assert server["errors"] == ["status 500: out of order"]


def test_a_start_in_the_future_is_waited_for() -> None:
    talk = [Conversation((Turn("now", 1),), start_seconds=0.0)]
    talk += [Conversation((Turn("then", 1),), start_seconds=0.3)]
    assert load([FakeServer()], talk, clients=2)["duration"] >= 0.3


def test_a_server_that_cannot_be_reached_is_one_sentence() -> None:
    async def go() -> None:
        await measure([Server("http://127.0.0.1:9")], TALK, 1)

    with pytest.raises(LoadTestError, match="/v1/models cannot be read"):
        asyncio.run(go())
    with pytest.raises(LoadTestError, match="'localhost:8000' is no address"):
        Server("localhost:8000")


def test_a_server_that_answers_nothing_is_an_error() -> None:
    fake = FakeServer("")
    with pytest.raises(LoadTestError, match="ended without a token"):
        load([fake], TALK[:1], clients=1)


def test_a_metrics_page_is_summed_over_engines() -> None:
    page = """# TYPE a counter
a_total{engine="0"} 2
a_total{engine="1",x="y z"} 3.5e1
b{reason="size",engine="0"} 1
c NaN
"""
    assert parse(page) == {"a": 37, "b/size": 1}
    with pytest.raises(LoadTestError, match="no metric"):
        parse("<html>not this</html>")


def test_an_increase_is_none_where_there_is_no_counter_and_an_error_after_a_restart() -> None:
    assert increase({}, {}, "a") is None
    assert increase({}, {"a": 3}, "a") == 3
    with pytest.raises(LoadTestError, match="started anew"):
        increase({"a": 4}, {"a": 3}, "a")


def test_busy_seconds_are_the_union_of_intervals() -> None:
    spans = ((0.0, 2.0), (1.0, 0.5), (1.5, 1.0), (5.0, 1.0))
    assert busy_seconds(Answer(sent, latency=latency) for sent, latency in spans) == 3.5
    assert busy_seconds([]) == 0


def test_percentiles_are_interpolated() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([1, 2, 3], 100) == 3
    assert percentile([7], 99) == 7


def test_the_ratio_is_a_geometric_mean_with_its_interval() -> None:
    pairs = [
        Request(0, turn, (Answer(0, "a", ttft=1.0), Answer(0, "a", ttft=ratio)))
        for turn, ratio in enumerate((0.25, 1.0, 0.5))
    ]
    mean, low, high = compared(pairs)["ttft_ratio"]
    assert mean == pytest.approx(0.5)
    assert low < 0.5 < high
    assert compared(pairs)["ttft_ratio_later_turns"][0] == pytest.approx(0.5**0.5)
    assert summary(pairs, 1)["median_ttft_later_turns_ms"] == pytest.approx(750)
