"""Pictures of the panels, from a Prometheus that answers every query alike."""

from __future__ import annotations

import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools import pictures
from tools.dashboard import PANELS

ASKED: list[str] = []


@pytest.fixture
def prometheus() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            ASKED.append(query["query"][0])
            start = float(query["start"][0])
            values = [[start, "1"], [start + 30, "NaN"], [start + 60, "3"]]
            result = [{"metric": {"reason": "changed"}, "values": values}]
            body = json.dumps({"status": "success", "data": {"result": result}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()
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
