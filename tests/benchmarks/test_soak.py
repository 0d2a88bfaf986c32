"""A run of `benchmarks.reliability.soak` that is ended early leaves what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import soak


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, ends_in: str | None) -> int:
    """A soak whose drivers find nothing, ended by hand in the driver of that name."""

    def found(driver: soak.Driver | None, *_: Any) -> dict[str, Any]:
        name = soak.ENDURANCE if driver is None else driver.name
        if name == ends_in:
            raise KeyboardInterrupt
        return {"name": name, "ok": True}

    monkeypatch.setattr(soak, "soak", found)
    monkeypatch.setattr(soak, "endurance", lambda *_: found(None))
    monkeypatch.setattr(sys, "argv", ["soak", "--out", str(out)])
    return soak.main()


def test_what_was_found_is_written_after_every_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second, *others = [driver.name for driver in soak.DRIVERS]
    with pytest.raises(KeyboardInterrupt):
        _run(monkeypatch, tmp_path, ends_in=others[0])
    report = json.loads((tmp_path / "results.json").read_text())
    assert [result["name"] for result in report["results"]] == [first, second]
    assert report["not_ended"] == [*others, soak.ENDURANCE]
    page = (tmp_path / "results.md").read_text()
    assert f"Ended before these did: {', '.join(report['not_ended'])}." in page


def test_a_whole_run_says_nothing_of_an_early_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _run(monkeypatch, tmp_path, ends_in=None) == 0
    assert json.loads((tmp_path / "results.json").read_text())["not_ended"] == []
    assert "Ended before" not in (tmp_path / "results.md").read_text()
