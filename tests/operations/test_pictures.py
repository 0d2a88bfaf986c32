"""Pictures of the panels, from a Prometheus that answers every query alike."""

from __future__ import annotations

import json
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import answering, serving
from tools import pictures
from tools.dashboard import PANELS

ASKED: list[str] = []


@pytest.fixture
def prometheus() -> Iterator[str]:
    def answer(path: str) -> bytes:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        ASKED.append(query["query"][0])
        start = float(query["start"][0])
        values = [[start, "1"], [start + 30, "NaN"], [start + 60, "3"]]
        result = [{"metric": {"reason": "changed"}, "values": values}]
        return json.dumps({"status": "success", "data": {"result": result}}).encode()

    with serving(answering(answer)) as url:
        yield url
    ASKED.clear()


def test_every_query_is_asked_with_its_variables_filled_in(
    prometheus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "panels.png"
    words = ["pictures", prometheus, "--minutes", "2", "--model", "m", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    pictures.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(ASKED) == sum(len(panel.queries) for panel in PANELS)
    assert not any("$" in query for query in ASKED)
    assert all('model_name=~"m"' in query for query in ASKED)


def test_a_line_has_its_legend_and_its_points(prometheus: str) -> None:
    panel = next(p for p in PANELS if p.title.startswith("Dropped"))
    ((legend, points),) = pictures.series(prometheus, panel, "m", "1m", 100.0, 160.0)
    assert legend == "changed"
    assert [when for when, _ in points] == [100.0, 130.0, 160.0]
    assert points[2][1] == 3
