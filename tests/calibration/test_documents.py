"""Calibration text: what is accepted, how it is cut, and what is said when it is bad."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from kvtc_vllm.calibration.documents import DataError, make_documents, read_texts
from kvtc_vllm.cli import main


def words(text: str) -> list[int]:
    return list(range(len(text.split())))


def test_reads_text_json_lines_chats_and_directories(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    chat = [{"role": "user", "content": "hello"}]
    lines = [{"text": "first"}, {"messages": chat}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"\xff\xfe")
    assert read_texts([str(tmp_path)], 1000) == ["plain", "first", chat]
    assert read_texts([str(tmp_path / "b.jsonl"), str(tmp_path / "a.txt")], 1000)[-1] == "plain"


def test_reads_no_more_than_needed(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("x" * 800)
    assert len(read_texts([str(tmp_path)], 150)) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, ["gone.txt", "no such file"]),
        ("binary.txt", b"\xff\xfe\x00", ["binary.txt", "UTF-8"]),
        ("bad.jsonl", b"{", ["bad.jsonl", "line 1", "not JSON"]),
        ("bad.jsonl", b'{"text": 3}', ["bad.jsonl", "line 1", '"text"']),
        ("bad.jsonl", b'{"messages": [{"content": 1}]}', ["bad.jsonl", "messages"]),
    ],
)
def test_bad_data_is_one_clear_line_before_any_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    words: list[str],
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    arguments = ["calibrate", "/no/such/model", "--data", str(path), "--out", str(tmp_path / "o")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "o").exists()


def test_an_empty_directory_and_a_bad_data_set_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no files"):
        read_texts([str(tmp_path)], 10)
    with pytest.raises(DataError, match="hf:NAME"):
        read_texts(["hf:name"], 10)


def test_hugging_face_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call and the errors; no data set can be downloaded here."""
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert read_texts(["hf:org/name:train:text"], 100) == ["one", "two"]
    assert read_texts(["hf:org/name:subset:train:text"], 100) == ["one", "two"]
    assert calls == [
        ("org/name", None, "train", True),
        ("org/name", "subset", "train", True),
    ]
    with pytest.raises(DataError, match=r"hf:org/name:train:body: .*'body'"):
        read_texts(["hf:org/name:train:body"], 100)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_texts(["hf:org/name:train:text"], 100)


def test_documents_are_cut_joined_and_held_out_whole() -> None:
    texts = ["w " * 5000, *["short " * 100] * 50]
    documents = make_documents(
        texts, words, max_tokens=1024, total_tokens=9000, heldout_fraction=0.1, seed=3
    )
    lengths = [len(d.token_ids) for d in documents]
    assert all(256 <= n <= 1024 for n in lengths)
    assert 9000 <= sum(lengths) < 9000 + 1024
    assert any(n <= 256 + 32 for n in lengths) or min(lengths) < 512 <= max(lengths)
    assert [d.doc for d in documents if d.heldout] == list(range(9, len(documents), 10))
    again = make_documents(
        texts, words, max_tokens=1024, total_tokens=9000, heldout_fraction=0.1, seed=3
    )
    assert again == documents


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="at least two documents of 256 tokens"):
        make_documents(
            ["few words"], words, max_tokens=1024, total_tokens=9000, heldout_fraction=0.1, seed=0
        )


def test_little_text_still_gives_one_document_of_each_sort() -> None:
    documents = make_documents(
        ["w " * 1500], words, max_tokens=1024, total_tokens=9000, heldout_fraction=0.1, seed=0
    )
    assert {d.heldout for d in documents} == {True, False}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--ratios", "8,x", ["--ratios", "4,8,16"]),
        ("--ratios", "0.5", ["--ratios", "above 1"]),
        ("--tokens", "0", ["--tokens 0", "at least 1"]),
        ("--layers-per-group", "none", ["--layers-per-group", "all"]),
        ("--heldout", "0.9", ["--heldout 0.9", "0.5"]),
        ("--key-share", "1.5", ["--key-share 1.5", "below 1"]),
        ("--halvings", "9", ["--halvings 9", "0 to 4"]),
        ("--halvings", "1", ["--halvings 1", "give --codec kvtc2"]),
        ("--basis-parts", "0", ["--basis-parts 0", "at least 1"]),
        ("--basis-parts", "3", ["--basis-parts 3", "--codec kvtc2"]),
        ("--engine", "[1]", ["--engine", "object"]),
        ("--device", "gpu", ["--device 'gpu'", "cuda:N"]),
        ("--tp", "0", ["--tp 0", "at least 1"]),
    ],
)
def test_bad_options_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: list[str]
) -> None:
    data = tmp_path / "a.txt"
    data.write_text("text")
    assert main(["calibrate", "m", "--data", str(data), option, value]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
