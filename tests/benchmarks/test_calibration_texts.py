"""The texts of the shipped artifact: only what is for calibration, no page of the demo."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import calibration_texts
from benchmarks.demo import documents
from kvtc_vllm.evaluation.data.public import DATA_SETS, Source, part_of

LINES = 400


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets whose every line tells its number and part."""
    contents = {
        "gsm8k-test": lambda mark: {"question": f"{mark} " * 40, "answer": mark},
        "nq-open": lambda mark: {
            "question": mark,
            "answers": [mark],
            "ctxs": [{"title": mark, "text": f"{mark} " * 40}] * 2,
        },
        "kv-retrieval": lambda mark: {
            "ordered_kv_records": [[f"{mark} {number}", mark] for number in range(75)]
        },
    }
    for name, content in contents.items():
        lines = "\n".join(
            json.dumps(content(f"<{part_of(number)}-{number}>")) for number in range(LINES)
        )
        path = tmp_path / DATA_SETS[name].file
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return tmp_path


def test_only_documents_for_calibration_are_read(data: Path) -> None:
    written = json.dumps(list(calibration_texts.texts(Source(str(data), "calibrate"))))
    assert written.count("<calibrate-") > 100
    assert "<tune-" not in written
    assert "<report-" not in written


def test_every_kind_comes_in_turn(data: Path) -> None:
    texts = list(calibration_texts.texts(Source(str(data), "calibrate")))
    first = ["messages" in text for text in texts[:9]]
    # Docstrings, sources, maths, passages; retrieval once in three rounds, the first included.
    assert first == [True, False, False, False, True, True, False, False, False]


def test_no_page_of_the_demo_is_in_it(data: Path) -> None:
    texts = calibration_texts.texts(Source(str(data), "calibrate"))
    written = " ".join(json.dumps(text).lower() for text in texts)
    for topic in documents.TOPICS:
        page = documents.page(topic).lower()
        middle = json.dumps(page[len(page) // 2 :][:100])[1:-1]
        assert middle not in written


def test_too_little_text_and_missing_data_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    argv = ["calibration_texts", "--out", str(out), "--data"]
    monkeypatch.setattr("sys.argv", [*argv, str(data), "--characters", "99000000"])
    assert calibration_texts.main() == 1
    assert "--characters 99000000: give less" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*argv, str(tmp_path / "nowhere")])
    assert calibration_texts.main() == 1
    assert "has no gsm8k-test.jsonl" in capsys.readouterr().err
