"""Rows, intervals, verdicts, report and card from records made by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

from kvtc_vllm.evaluation.job import Outcome, Record, StoredBytes
from kvtc_vllm.evaluation.meter import Meter
from kvtc_vllm.evaluation.methods import Method, MethodError, find
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.quality_card import card
from kvtc_vllm.evaluation.reporting.results import (
    EXACT,
    SECONDS,
    damaged,
    exact_rows,
    rows,
    unanswered,
)


def record(session: int, **changes) -> Record:
    values = {
        "task": "litm",
        "context": 512,
        "session": session,
        "label": f"depth {session % 2}",
        "is_answer": True,
        "prompt_tokens": 512,
        "reloaded_tokens": 384,
        "target_tokens": 4,
        "nll_exact": 2.0,
        "nll": 2.4,
        "kl": 0.04,
        "agreed": 4,
        "correct_exact": True,
        "correct": True,
    }
    return Record(**(values | changes))


def outcome(records: list[Record], name: str = "kvtc-16x") -> Outcome:
    stored = [StoredBytes(task="litm", context=512, raw=1600, stored=100)]
    return Outcome(
        method=Method(name, "16x"), records=records, stored=stored, skipped=[], documents=[]
    )


def value(found, metric: str, label: str = "") -> float:
    return next(r.value for r in found if (r.metric, r.label) == (metric, label))


def test_figures_are_ratios_of_sums() -> None:
    found = rows(outcome([record(0), record(1, nll=4.0, target_tokens=8, correct=False)]))
    assert value(found, "nll") == pytest.approx((2.4 + 4.0) / 12)
    assert value(found, "nll_change") == pytest.approx((0.4 + 2.0) / 12)
    assert value(found, "accuracy") == 0.5
    assert value(found, "accuracy_change") == -0.5
    assert value(found, "accuracy", "depth 0") == 1.0
    assert value(found, "reloaded_share") == 0.75
    assert {row.real_ratio for row in found} == {16.0}
    exact = exact_rows(outcome([record(0), record(1)]))
    assert value(exact, "accuracy") == 1.0
    assert {row.method for row in exact} == {EXACT}


def test_seconds_are_a_figure_of_all_examples_where_they_were_measured() -> None:
    made = outcome([record(0), record(1)])
    assert not any(row.metric == SECONDS for row in [*rows(made), *exact_rows(made)])
    (size,) = made.stored
    timed = msgspec.structs.replace(size, read=50, seconds=12.345, exact_seconds=3.0)
    made = msgspec.structs.replace(made, stored=[timed])
    (own,) = [row for row in rows(made) if row.metric == SECONDS]
    assert (own.value, own.n, own.label, own.read_ratio) == (12.35, 2, "", 32.0)
    (exact,) = [row for row in exact_rows(made) if row.metric == SECONDS]
    assert (exact.method, exact.value, exact.n) == (EXACT, 3.0, 2)
    assert own.by_session == exact.by_session == []


def test_a_meter_adds_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 3.0, 10.0, 14.0, 20.0, 21.0))
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    meter = Meter()
    for name in ("h2o", EXACT, "h2o"):
        with meter.on(name):
            pass
    assert (meter.spent("h2o"), meter.spent(), meter.spent("tova")) == (3.0, 4.0, 0.0)


def test_interval_covers_the_spread_and_shrinks_with_examples() -> None:
    def width(count: int) -> float:
        records = [record(i, correct=i % 2 == 0, label="") for i in range(count)]
        row = next(r for r in rows(outcome(records)) if r.metric == "accuracy")
        assert row.ci95[0] < 0.5 < row.ci95[1]
        return row.ci95[1] - row.ci95[0]

    assert width(10) > 2 * width(200)
    single = next(r for r in rows(outcome([record(0)])) if r.metric == "kl")
    assert single.ci95 == (float("-inf"), float("inf"))


def test_turns_of_one_chat_are_one_sample() -> None:
    chat = [record(0, kl=k) for k in (0.0, 0.4)] + [record(1, kl=k) for k in (0.0, 0.4)]
    row = next(r for r in rows(outcome(chat)) if (r.metric, r.label) == ("kl", ""))
    assert row.ci95 == pytest.approx((row.value, row.value))


def test_kl_is_kept_by_session_for_pairs() -> None:
    chats = [record(1, kl=0.4), record(0, kl=0.2), record(1, kl=0.8), record(0, kl=0.0)]
    kept = {(r.metric, r.label): r.by_session for r in rows(outcome(chats)) if r.by_session}
    assert kept == {("kl", ""): [pytest.approx(0.2 / 8), pytest.approx(1.2 / 8)]}


def test_damage_needs_the_whole_interval_beyond_the_limit() -> None:
    sound = [record(i) for i in range(20)]
    assert damaged(rows(outcome(sound))) == {}
    diverged = [record(i, kl=4.0) for i in range(20)]
    assert damaged(rows(outcome(diverged))) == {("litm", 512): "KL 1.000 nats a token"}
    wrong = [record(i, correct=False) for i in range(20)]
    assert damaged(rows(outcome(wrong))) == {("litm", 512): "accuracy -100%"}
    doubtful = [record(i, kl=4.0 if i == 0 else 0.0) for i in range(4)]
    assert damaged(rows(outcome(doubtful))) == {}


def test_report_and_card(tmp_path: Path) -> None:
    result = outcome([record(i, correct=i > 3) for i in range(8)])
    found = [*exact_rows(result), *rows(result)]
    report.write(tmp_path, {"command": "kvtc eval"}, found)
    assert report.read(tmp_path / "results.json") == found
    first = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    fields = {"task", "method", "plan", "real_ratio", "context", "metric", "value", "ci95", "n"}
    assert fields <= set(first)
    text = (tmp_path / "results.md").read_text()
    assert "| kvtc-16x | 16.0 |" in text
    assert "KL:\n\n| method | depth 0 | depth 1 |\n" in text
    assert "| kvtc-16x | 0.0100 | 0.0100 |" in text
    assert (tmp_path / "results.png").stat().st_size > 5000
    page = card("tp1-all-0", {"command": "kvtc eval"}, found)
    assert "100% -> 50%" in page
    assert "- 16x: litm at 512 (accuracy -50%)" in page
    assert "| recomputed | 100% | 100% |" in page


def test_unknown_method_lists_what_is_known() -> None:
    assert find("kvtc-8x").ratio == 8.0
    assert find("kivi-2bit").override == {"baseline": "kivi-2bit"}
    assert find("h2o").tokens == "h2o"
    with pytest.raises(MethodError, match="kivi-2bit"):
        find("zip")


def test_accuracy_is_left_out_where_the_exact_run_fails() -> None:
    shown = {}
    for answered in (True, False):
        measured = outcome([record(n, correct_exact=answered or n == 0) for n in range(4)])
        found = [*exact_rows(measured), *rows(measured)]
        assert unanswered(found) == ({} if answered else {("litm", 512): 0.25})
        shown[answered] = report.markdown({}, found)
        assert "| kvtc-16x | 16.0 | 0.0100" + (", 100% |" if answered else " |") in shown[answered]
    assert "Accuracy is left out: the exact run answers 25%." in shown[False]
    assert "left out" not in shown[True]
    assert shown[True].count("accuracy |") == 1
    assert shown[False].count("accuracy |") == 0
