"""What the demo makes of counters and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo.conversations import Run, RunReport, Turn, hold, summarise
from benchmarks.demo.report import plot, side_by_side, table
from benchmarks.demo.server import Answer

MIB = 1 << 20
REFERENCE = [["one two three", "four five"], ["six", "seven"]]


def run(**metrics: float) -> Run:
    """Two chats of two turns; the second turn of each reloads 1024 of 1400 tokens."""
    turns = [
        Turn(chat=0, prompt_tokens=1300, reloaded=0, cached=0, ttft=2.0),
        Turn(chat=1, prompt_tokens=1300, reloaded=0, cached=64, ttft=2.0),
        Turn(chat=0, prompt_tokens=1400, reloaded=1024, cached=0, ttft=0.5),
        Turn(chat=1, prompt_tokens=1400, reloaded=512, cached=0, ttft=1.5),
    ]
    counted = {
        "hit_tokens": 1536,
        "loaded_tokens": 1536,
        "stored_chunks": 20,
        "stored_raw_bytes": 20 * MIB,
        "tier_chunks": 10,
        "tier_used_bytes": MIB,
        "dropped_stores": 1,
        **metrics,
    }
    answers = [["one two other", "four five"], ["six", "eight"]]
    return Run(turns, answers, {f"vllm:kvtc_{name}": value for name, value in counted.items()})


def summary(observed: Run, element_bytes: int = 2) -> RunReport:
    return summarise(
        observed,
        REFERENCE,
        2,
        window=128,
        chunk_tokens=128,
        budget=2 * MIB,
        element_bytes=element_bytes,
    )


def test_figures_are_those_of_the_counters() -> None:
    found = summary(run())
    assert (found.prompt_tokens, found.computed_tokens, found.reloaded_tokens) == (5400, 3800, 1536)
    assert (found.raw_bytes, found.stored_bytes, found.ratio) == (10 * MIB, MIB, 10)
    assert found.conversations_resident == 1
    # 1400 tokens are 10.9 chunks of 1 MiB, 1.09 MiB at this ratio.
    assert found.conversations_fit == 1
    assert (found.ttft_mean_s, found.ttft_p95_s) == (1.0, 1.5)
    assert found.answers_equal_fraction == 0.5
    assert found.words_equal_fraction == 5 / 7
    assert found.dropped_stores == 1


def test_uncompressed_kv_counts_16_bits_an_element_whatever_the_cache_has() -> None:
    found, wide = summary(run()), summary(run(), element_bytes=4)
    assert (wide.raw_bytes, wide.stored_bytes, wide.ratio) == (5 * MIB, MIB, 5)
    assert wide.conversations_fit == found.conversations_fit


@pytest.mark.parametrize("counter", ["hit_tokens", "loaded_tokens"])
def test_counters_that_disagree_are_an_error(counter: str) -> None:
    with pytest.raises(RuntimeError, match="vLLM counted 1536 reloaded tokens"):
        summary(run(**{counter: 1408}))


def test_a_tier_above_its_budget_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="its budget is 2097152"):
        summary(run(tier_used_bytes=3 * MIB))


class FakeServer:
    """Repeats the last question; keeps what it was asked and whether it was given time."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.settled = 0

    def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        assert self.settled == len(self.asked)
        self.asked.append(messages)
        return Answer(messages[-1]["content"].upper(), 0.1, len(messages))

    def settle(self) -> dict[str, float]:
        self.settled += 1
        return {"vllm:prefix_cache_hits": 10.0 * self.settled}


def test_conversations_take_turns_and_see_the_answers_of_the_reference() -> None:
    server = FakeServer()
    found = hold(server, [["a", "b"], ["c", "d"]], [["1", "2"], ["3", "4"]], "x", "be short")  # type: ignore[arg-type]
    said = [[message["content"] for message in messages] for messages in server.asked[1:]]
    assert said == [
        ["be short", "a"],
        ["be short", "c"],
        ["be short", "a", "1", "b"],
        ["be short", "c", "3", "d"],
    ]
    assert found.answers == [["A", "B"], ["C", "D"]]
    assert [turn.cached for turn in found.turns] == [10, 10, 10, 10]


def test_table_and_plot_show_every_run(tmp_path: Path) -> None:
    base = summary(run())
    runs = {
        "recompute": changed(base, ratio=0.0, budget_bytes=0, stored_bytes=0),
        "kvtc-8x": changed(base, ttft_mean_s=0.25),
    }
    lines = table(runs, 2, "recompute").splitlines()
    assert lines[2].split()[:5] == ["recompute", "-", "1000", "ms", "1.00"]
    assert lines[3].split()[:5] == ["kvtc-8x", "2", "250", "ms", "0.25"]
    plot(runs, 2, "recompute", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def changed(report: RunReport, **changes: float) -> RunReport:
    fields = {name: getattr(report, name) for name in report.__struct_fields__}
    return RunReport(**{**fields, **changes})


def test_answers_are_printed_side_by_side() -> None:
    text = side_by_side(
        {"page": "try", "question": "Why?", "answers": {"exact": "So.", "kvtc-16x": "Thus.\nYes."}}
    )
    assert text.splitlines() == [
        "One answer, about the page 'try': Why?",
        "     exact  So.",
        "  kvtc-16x  Thus. Yes.",
    ]
