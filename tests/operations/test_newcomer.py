"""The walk through the quick start: which commands, in which shell, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import newcomer

NAMES = {"REPOSITORY": "r", "MODEL": "m", "texts/": "t", "64GiB": "1GiB"}


def test_the_page_has_the_whole_way() -> None:
    page = newcomer.PAGE.read_text()
    found = [newcomer.filled(block, NAMES) for block in newcomer.blocks(page)]
    starts = ["git clone r ", "pip install", "make setup", "kvtc calibrate m --data t "]
    starts += ["kvtc doctor m", "vllm serve m ", "kvtc bench http://localhost:8000"]
    assert [block.startswith(start) for block, start in zip(found, starts, strict=True)] == [
        True
    ] * len(starts)
    assert newcomer.SMALL_CACHE in page
    assert newcomer.LESS_MEMORY in page
    assert newcomer.SMALL_CACHE in found[5]
    assert "memory_bytes=1GiB" in found[5]


def test_folder_and_exports_hold_for_the_next_commands(tmp_path: Path) -> None:
    commands = ["mkdir a && cd a\nexport WHAT='so it is'\n", 'echo "$WHAT" > b\n']
    assert [step["commands"] for step in newcomer.walk(commands, {}, tmp_path)] == [
        block.strip() for block in commands
    ]
    assert (tmp_path / "a" / "b").read_text() == "so it is\n"


def test_a_result_has_nothing_of_the_machine(tmp_path: Path) -> None:
    (step,) = newcomer.walk(["echo MODEL > said\n"], {"MODEL": str(tmp_path)}, tmp_path)
    assert step["commands"] == "echo MODEL > said"
    assert (tmp_path / "said").read_text() == f"{tmp_path}\n"


def test_the_page_has_the_figures_of_the_walk() -> None:
    result = json.loads((newcomer.ROOT / "benchmarks/results/newcomer.json").read_text())
    minutes = [step["seconds"] / 60 for step in result["steps"]]
    demo, installed, calibrated, *rest = minutes
    said = [
        f"it took {sum(minutes):.0f} minutes",
        f"the demo with its installation {demo + installed:.0f}, ",
        f"all 160,000 tokens {calibrated:.0f}, ",
        f"`kvtc bench` {sum(rest):.0f}.",
    ]
    page = newcomer.PAGE.read_text()
    assert [text for text in said if text not in page] == []


def test_a_command_that_fails_ends_the_walk_and_is_told(tmp_path: Path) -> None:
    with pytest.raises(newcomer.WalkError, match=r"(?s)'echo why; false; touch x' failed.*why"):
        list(newcomer.walk(["echo why; false; touch x\n"], {}, tmp_path))
    assert not (tmp_path / "x").exists()


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    """A stand-in's: vLLM's own takes a minute to find that there is no model."""
    stand_in = tmp_path / "bin" / "vllm"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "no model at $2"\nexit 1\n')
    stand_in.chmod(0o755)
    commands = [f"export PATH={stand_in.parent}:$PATH\n", "vllm serve /nowhere\n"]
    with pytest.raises(newcomer.WalkError, match=r"(?s)did not start.*no model at /nowhere"):
        list(newcomer.walk(commands, {}, tmp_path))
