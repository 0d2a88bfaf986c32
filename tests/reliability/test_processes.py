"""kill -9, and several processes on one root. The drivers run without pytest and torch, because
they fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALL = os.environ.get("KVTC_DISK") == "all"
"""`make test-disk`"""


def drive(module: str, *arguments: str, scratch: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", f"tests.reliability.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    return result.stdout


@pytest.mark.crash
@pytest.mark.slow
def test_200_kills_leave_a_sound_tier(tmp_path: Path) -> None:
    printed = drive("kill9", "--cycles", "200", scratch=tmp_path)
    assert "'killed': 400" in printed
    assert "'temporaries_left_by_kills': 0" not in printed, "no kill hit a writer"


@pytest.mark.crash
@pytest.mark.slow
def test_a_kill_at_every_call_leaves_a_sound_tier(scratch: Path) -> None:
    drive("kill9", "--points", "1", scratch=scratch)


@pytest.mark.crash
@pytest.mark.slow
def test_kills_leave_no_reference_without_what_it_refers_to(tmp_path: Path) -> None:
    printed = drive("kill9", "--shared", "--cycles", "200" if ALL else "30", scratch=tmp_path)
    assert "'references_among_them': 0" not in printed


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="make test-disk runs it")
def test_a_kill_at_every_call_of_references_leaves_a_sound_tier(scratch: Path) -> None:
    printed = drive("kill9", "--shared", "--points", "1", scratch=scratch)
    assert "'links': 0" not in printed


@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="make test-disk runs it")
def test_damaged_references_are_misses_and_no_bytes_are_lost(scratch: Path) -> None:
    printed = drive("hostile", "--shared", "--cycles", "100", scratch=scratch)
    assert "'references_among_them': 0" not in printed


@pytest.mark.slow
def test_processes_that_refer_to_each_other_s_chunks_never_diverge(tmp_path: Path) -> None:
    processes, operations = ("8", "10000") if ALL else ("3", "1500")
    arguments = ("--shared", "--processes", processes, "--operations", operations)
    printed = drive("replicas", *arguments, scratch=tmp_path)
    assert "'divergences': 0" in printed
    assert "'references': 0" not in printed


@pytest.mark.slow
def test_eight_processes_on_one_root_never_diverge_from_the_model(tmp_path: Path) -> None:
    printed = drive("replicas", "--processes", "8", "--operations", "10000", scratch=tmp_path)
    assert "'operations': 10000, 'divergences': 0" in printed


def test_writers_start_without_torch() -> None:
    code = "import sys, kvtc_vllm.tiers.disk; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
