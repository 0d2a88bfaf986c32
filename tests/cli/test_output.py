"""Facts are YAML or JSON, and a reader that has seen enough ends a command quietly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvtc_vllm.cli import main
from kvtc_vllm.cli.facts import print_facts

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = next((ROOT / "calibrations" / "kvtc-reference").glob("tp1-*"))
GOLDEN = ROOT / "tests" / "golden" / "v1-kvtc-bf16-long.kvtc"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", str(SHIPPED)],
        ["inspect", str(GOLDEN)],
        ["artifacts"],
        ["plan", "--kv-bytes-per-token", "1000"],
    ],
    ids=lambda words: " ".join(words[:1]),
)
def test_the_default_is_yaml_of_the_same_facts_as_json(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    as_yaml = yaml.safe_load(capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    # `plan` rounds for people.
    assert rounded(as_yaml) == rounded(as_json)
    assert as_yaml


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def test_tuples_and_equal_lists_are_plain_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    pair = [1, 2]
    print_facts({"a": (1, "x: y"), "b": pair, "c": pair, "d": {}}, as_json=False)
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"a": [1, "x: y"], "b": [1, 2], "c": [1, 2], "d": {}}
    assert "&" not in printed


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """More than a pipe holds, so that the command meets the closed end while it writes."""
    program = (
        "import sys; from kvtc_vllm.cli import COMMANDS, main;"
        "COMMANDS['config'].run = lambda args: print('x' * 2**20) or 0;"
        "sys.exit(main(['config']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert said == b""
