"""Bytes at equal KL by kind of text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import equal_kl


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """KL is the square of the real ratio; of `new` over 4 on prose, and over 16 on code."""
    rows = [
        {
            "kind": kind,
            "artifact": artifact,
            "real_ratio": ratio,
            "by_document": [ratio**2 / less, ratio**2 / less],
        }
        for artifact, ratios in (("old", (8.0,)), ("new", (8.0, 16.0, 64.0)))
        for kind, gain in (("prose", 4.0), ("code", 16.0))
        for less in (1.0 if artifact == "old" else gain,)
        for ratio in ratios
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"documents": ["a", "b"], "rows": rows}))
    return path


@pytest.mark.parametrize(("kind", "ratio", "factor"), [("prose", 16, 2), ("code", 32, 4)])
def test_each_kind_has_its_own_factor(
    result: Path,
    kind: str,
    ratio: int,
    factor: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["equal_kl", f"{result}:old", f"{result}:new", "--kind", kind]
    monkeypatch.setattr(sys, "argv", command)
    equal_kl.main()
    line = f"8x, KL 64.00000: {ratio}.0x, {factor}.00 [{factor}.00, {factor}.00]"
    assert capsys.readouterr().out.strip() == line


@pytest.mark.parametrize("kind", [None, "chats"])
def test_a_file_of_several_kinds_needs_one_of_them(result: Path, kind: str | None) -> None:
    with pytest.raises(SystemExit, match=f"no kind of text {kind!r}; it has code, prose"):
        equal_kl.read_curve(f"{result}:old", kind)


def test_documents_of_other_results_are_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    row = {"artifact": "a", "real_ratio": 8.0, "by_document": [1.0, 2.0, 3.0]}
    path.write_text(json.dumps({"documents": ["essay 3", "maths 1", "essay 7"], "rows": [row]}))
    assert equal_kl.read_curve(f"{path}:a", "essay").kls.tolist() == [[1.0, 3.0]]
    assert equal_kl.read_curve(f"{path}:a").kls.tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(SystemExit, match="no document's name begins with 'code'"):
        equal_kl.read_curve(f"{path}:a", "code")
