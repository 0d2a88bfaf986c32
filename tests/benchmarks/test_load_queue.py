"""A run of `benchmarks.reliability.load_queue` that is cut short leaves what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.reliability import load_queue
from benchmarks.reliability.load_queue import Load, Moment


def _burst(first: float, wait: float, share: float = 0.5) -> dict[str, Any]:
    """One prompt: its first token after `first` seconds, its load after `wait`.

    share: of a processor that the process has.
    """
    began, ended = Moment(10.0, 3.0), Moment(10.0 + wait, 3.0 + share * wait)
    loads = [Load(load_queue.TOKENS, began, ended)]
    return {"first": [Moment(first, share * first)], "loads": loads, "given up": 0}


def test_a_round_that_has_not_ended_is_compared_with_its_own_kind() -> None:
    whole = {"computed": [_burst(1.0, 0.0)], "load_gate on": [_burst(0.5, 0.5)]}
    begun = {
        "computed": [_burst(1.0, 0.0), _burst(9.0, 0.0)],
        "load_gate on": [_burst(0.5, 0.5)],
        "load_gate off": [],
    }
    found = load_queue._summary(begun)
    assert set(found) == {"computed", "load_gate on"}
    assert found["load_gate on"] == load_queue._summary(whole)["load_gate on"]
    assert found["load_gate on"]["longest wait / recomputation"] == [0.5]
    assert found["computed"]["last first token, ms"] == 5000.0


def test_programs_that_take_the_processor_in_one_burst_lengthen_no_wait_in_processor_time() -> None:
    bursts = {"computed": [_burst(1.0, 0.0)], "load_gate on": [_burst(2.4, 2.0, share=0.1)]}
    row = load_queue._summary(bursts)["load_gate on"]
    assert row["longest wait / recomputation"] == [2.0]
    assert row["waits above recomputation, %"] == 100.0
    assert row["worst first token / computed"] == 2.4
    work = row["in processor time"]
    assert work["longest wait / recomputation"] == [0.4]
    assert work["waits above recomputation, %"] == 0.0
    assert work["worst first token / computed"] == 0.48


def test_the_file_says_whether_the_run_ended(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    load_queue._save(out, {"rounds": 2}, False, {"slow tier": {}})
    assert json.loads(out.read_text()) == {"rounds": 2, "complete": False, "slow tier": {}}
    text = load_queue._save(out, {"rounds": 2}, True, {"slow tier": {"loads": [1]}})
    assert json.loads(text) == json.loads(out.read_text())
    assert json.loads(text)["complete"]
    assert list(tmp_path.iterdir()) == [out]
