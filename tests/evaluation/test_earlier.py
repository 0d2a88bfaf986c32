"""Results of several runs in one report: what is kept, replaced, dropped and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.earlier import Earlier
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

ABOUT: dict[str, Any] = {
    "command": "kvtc eval small",
    "model": "small",
    "seed": 0,
    "versions": {"vllm": "1"},
    "documents": "part report; numbers are 0, 1, 2 and 3 for reports: essays 3, 11; maths 7",
}


def row(method: str, value: float, task: str = "essays", n: int = 8, metric: str = "nll") -> Row:
    return Row(
        task=task,
        method=method,
        plan="",
        real_ratio=1.0,
        context=512,
        label="",
        metric=metric,
        value=value,
        ci95=(value, value),
        n=n,
    )


FIRST = [row(EXACT, 2.0), row("raw", 2.0), row("kvtc-8x", 2.1), row(EXACT, 3.0, "maths")]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    report.write_rows(tmp_path, ABOUT, FIRST)
    return tmp_path


def test_methods_are_added_and_replaced(directory: Path) -> None:
    now = [row(EXACT, 2.0001), row("kvtc-8x", 2.2), row("xkv", 2.3)]
    about = {
        **ABOUT,
        "command": "kvtc eval small --methods xkv",
        "documents": "part report; numbers are 0, 1, 2 and 3 for reports: essays 3, 15",
    }
    joined, rows = Earlier(directory, about).joined(about, now)
    assert joined["command"] == "kvtc eval small; kvtc eval small --methods xkv"
    assert joined["documents"].endswith("for reports: essays 3, 11, 15; maths 7")
    assert rows == [FIRST[0], FIRST[1], FIRST[3], now[1], now[2]]


def test_seconds_are_kept_by_command_and_told_with_how_many_have_none(tmp_path: Path) -> None:
    first, second = "kvtc eval small --count 4", "kvtc eval small --count 8"
    taken = {first: {"wall": 30, "processor": 20}, second: {"wall": 7, "processor": 5}}
    report.write_rows(tmp_path, ABOUT, FIRST)  # Before seconds were recorded.
    for command, seconds in taken.items():
        about = {**ABOUT, "command": command, "seconds": {command: seconds}}
        report.write_rows(tmp_path, *Earlier(tmp_path, about).joined(about, FIRST))
    joined = msgspec.json.decode((tmp_path / "results.json").read_bytes())["about"]
    assert joined["seconds"] == taken
    line = "- seconds: 37 on the clock, 25 of processors, 2 of 3 commands"
    assert line in report.head(joined)
    assert not any("seconds" in line for line in report.head(ABOUT))


def test_the_same_command_is_named_once(directory: Path) -> None:
    joined, rows = Earlier(directory, ABOUT).joined(ABOUT, FIRST)
    assert joined == ABOUT
    assert sorted(map(str, rows)) == sorted(map(str, FIRST))


@pytest.mark.parametrize("exact", [row(EXACT, 2.5), row(EXACT, 2.0, n=16)])
def test_figures_of_other_prompts_are_dropped(directory: Path, exact: Row) -> None:
    now = [exact, row("xkv", 2.3, n=exact.n)]
    _, rows = Earlier(directory, ABOUT).joined(ABOUT, now)
    assert rows == [FIRST[3], *now]


def test_nothing_earlier_is_no_error(tmp_path: Path) -> None:
    assert Earlier(tmp_path, ABOUT).joined(ABOUT, FIRST) == (ABOUT, FIRST)


@pytest.mark.parametrize(("key", "value"), [("model", "large"), ("seed", 1), ("versions", {})])
def test_results_of_something_else_are_refused(directory: Path, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"figures of {key}"):
        Earlier(directory, {**ABOUT, key: value})


def test_unreadable_results_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read as results"):
        Earlier(tmp_path, ABOUT)
