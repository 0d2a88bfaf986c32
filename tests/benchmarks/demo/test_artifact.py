"""The demo's artifact: made once, found again, made anew for anything else."""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path

import pytest

from benchmarks.demo import artifact
from kvtc_vllm.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests" / "reference_model" / "model"
SHIPPED = ROOT / "calibrations" / "kvtc-reference" / "tp1-all-af3a0224"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; each leaves an artifact where it should."""
    found: list[list[str]] = []

    def calibrate(command: list[str], log: Path) -> None:
        found.append(command)
        options = dict(itertools.pairwise(command))
        made = Path(options["--out"]) / options["--model-name"] / options["--name"]
        shutil.copytree(SHIPPED, made)

    monkeypatch.setattr(artifact, "_calibrate", calibrate)
    return found


def test_it_is_made_once_and_found_again(tmp_path: Path, commands: list[list[str]]) -> None:
    first = artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0, 16.0), "bfloat16", tmp_path, tmp_path / "log", shipped=False
    )
    again = artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0, 16.0), "bfloat16", tmp_path, tmp_path / "log", shipped=False
    )
    assert first == again
    assert first.parent == tmp_path / "model"
    assert len(commands) == 1
    other = artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0,), "bfloat16", tmp_path, tmp_path / "log", shipped=False
    )
    assert other != first
    assert len(commands) == 2


def test_the_shipped_one_is_taken_if_it_has_every_ratio(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    found = artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0, 16.0), "bfloat16", tmp_path, tmp_path / "log"
    )
    assert found == SHIPPED
    assert not commands
    artifact.find_or_calibrate(MODEL, "kvtc", (8.0, 17.0), "bfloat16", tmp_path, tmp_path / "log")
    assert len(commands) == 1


def test_a_user_without_a_home_is_told_what_to_set(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    found = artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0, 16.0), "bfloat16", None, tmp_path / "log"
    )
    assert found == SHIPPED
    with pytest.raises(ValueError, match="XDG_DATA_HOME"):
        artifact.find_or_calibrate(MODEL, "kvtc", (17.0,), "bfloat16", None, tmp_path / "log")
    assert not commands


def test_its_command_is_one_that_the_command_line_takes(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    artifact.find_or_calibrate(
        MODEL, "kvtc", (8.0, 16.0), "bfloat16", tmp_path, tmp_path / "log", shipped=False
    )
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS["calibrate"].add_arguments(parser)
    words = commands[0][commands[0].index("calibrate") + 1 :]
    parsed = parser.parse_args(words)
    assert (parsed.model, parsed.ratios, parsed.tokens) == (str(MODEL), "8,16", artifact.ROWS)


def test_a_calibration_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match=r"(?s)ended with status .*no such file or directory"):
        artifact._calibrate(
            [
                *artifact._command(
                    MODEL, "kvtc", (8.0,), "bfloat16", tmp_path / "missing.jsonl", tmp_path, "n"
                )
            ],
            log,
        )


def test_a_line_tells_what_it_was_calibrated_on() -> None:
    line = artifact.describe(SHIPPED)
    assert line.startswith("calibrated on ")
    assert "Python's language reference" not in line
