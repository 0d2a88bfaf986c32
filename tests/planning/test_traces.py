"""The plan against hits that the connector's own scheduler had on three kinds of traffic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.store_policy.predicted import OUT, TRAFFIC, predict
from kvtc_vllm.load_test.traffic import Traffic

MEASURED = json.loads(OUT.read_text())
PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda r: f"{r['traffic']}-{r['clients']}")
def test_hits_of_a_trace_are_predicted(row: dict[str, Any]) -> None:
    traffic = Traffic(**MEASURED["traffic"][row["traffic"]])
    planned, simulated = predict(traffic, row["clients"])
    assert planned == pytest.approx(row["measured"], rel=0.2)
    assert simulated == pytest.approx(row["measured"], rel=0.2)


def test_the_traces_are_those_of_the_benchmark() -> None:
    found = {(row["traffic"], row["clients"]) for row in MEASURED["rows"]}
    assert found == {(name, size) for name, (_, sizes) in TRAFFIC.items() for size in sizes}
    for name, (traffic, _) in TRAFFIC.items():
        assert Traffic(**MEASURED["traffic"][name]) == traffic


def test_the_page_shows_them() -> None:
    page = PAGE.read_text()
    for row in MEASURED["rows"]:
        cells = " | ".join(f"{100 * row[key]:.1f} %" for key in ("measured", "plan", "simulate"))
        assert f"| {row['traffic']}, {row['clients']} | {cells} |" in page
