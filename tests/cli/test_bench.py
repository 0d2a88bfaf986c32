"""`kvtc bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvtc_vllm.cli import main
from tests.load_test.fake_server import FakeServer, in_a_thread


def test_the_command_writes_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--out", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    small = ["--conversations", "2", "--turns", "2", "--think-seconds", "0", "--clients", "2"]
    with in_a_thread(FakeServer()) as url:
        assert main(["bench", url, *small, *files]) == 0
        printed = capsys.readouterr()
        assert main(["bench", url, *small, "--json"]) == 0
    assert "time to first token, median" in printed.out
    assert "4 of 4 turns, 0 failed" in printed.err
    assert json.loads(capsys.readouterr().out)["servers"][0]["completed"] == 4
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["traffic"]["turns"] == 2
    assert len(result["requests"]) == 4
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:9"], "cannot be read"),
        (["http://a", "http://b", "http://c"], "3 servers are named"),
        (["http://a", "--clients", "0"], "--clients is 0"),
        (["http://a", "--timeout", "-1"], "--timeout is -1"),
        (["http://a", "--turns", "0"], "turns is 0"),
        (["http://a", "--out", "gone/r.json"], "there is no directory"),
        (["http://a", "--plot", "r.txt"], "must end in .png"),
        (["http://a", "--trace", "gone.jsonl"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_server_without_metrics_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeServer()
    fake.metrics.clear()
    small = ["--conversations", "1", "--turns", "1", "--think-seconds", "0"]
    with in_a_thread(fake) as url:
        assert main(["bench", url, *small]) == 2
        assert "holds no metric in Prometheus' text format; --no-metrics" in capsys.readouterr().err
        assert main(["bench", url, *small, "--no-metrics"]) == 0
    assert "share of hits" not in capsys.readouterr().out
