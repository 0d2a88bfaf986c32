"""Cards and rank files that are something else: an error that names them, at once, in no memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.artifact.text import printable
from kvtc_vllm.cli import main
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.toy import IDENTITY, RANK_FILE


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    target = tmp_path / "registry" / "org--toy" / "artifact"
    shutil.copytree(written, target)
    return target


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sparse(path: Path) -> None:
    path.write_bytes(b"{")
    os.truncate(path, 1 << 40)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "directory": Path.mkdir,
    "sparse": sparse,
    "nested": lambda path: path.write_bytes(b"[" * 1_000_000) and None,
    "nested objects": lambda path: path.write_bytes(b'{"a":' * 1_000_000) and None,
    "empty": Path.touch,
    "no UTF-8": lambda path: path.write_bytes(b'{"\xff": 1}') and None,
}


def replace(path: Path, kind: str) -> None:
    path.unlink()
    KINDS[kind](path)


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["card.json", RANK_FILE])
def test_what_is_no_artifact_file_is_one_clear_error(name: str, kind: str, copy: Path) -> None:
    replace(copy / name, kind)

    def load() -> None:
        with pytest.raises(ArtifactError, match=name):
            load_rank_artifact(copy, 0)

    assert peak(load) < 32 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_neighbour_stops_no_search(
    kind: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/nowhere")
    monkeypatch.delenv("KVTC_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "shipped_registry", lambda: Path("/nowhere"))
    neighbour = copy.parent.parent / "another--model" / "artifact"
    shutil.copytree(copy, neighbour)
    replace(neighbour / "card.json", kind)
    places = [copy.parent.parent]
    assert find(IDENTITY, 1, 4.0, model_name="org/toy", registries=places) == copy


def test_links_to_plain_files_are_followed(copy: Path, tmp_path: Path) -> None:
    """As download caches have them."""
    for path in list(copy.iterdir()):
        moved = tmp_path / path.name
        path.rename(moved)
        path.symlink_to(moved)
    load_rank_artifact(copy, 0)


def test_any_flipped_bit_of_a_card_is_an_error_or_harmless(copy: Path) -> None:
    content = (copy / "card.json").read_bytes()
    card = load_card(copy)
    refused = 0
    for bit in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (copy / "card.json").write_bytes(damaged)
        try:
            found = load_card(copy)
        except ArtifactError:
            refused += 1
        else:
            assert found.tp_size == card.tp_size
    assert refused > len(content) // 2


def test_a_size_is_compared_before_a_file_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / RANK_FILE).write_bytes(b"short")
    monkeypatch.setattr("kvtc_vllm.artifact.directory.checksum", None)
    with pytest.raises(ArtifactError, match=r"damaged: 5 bytes, card\.json says"):
        load_rank_artifact(copy, 0)


FORGED = "\x1b[2J\x1b]0;owned\x07good\nmodel_name: forged\r\u202egpj\u2028\x9b31m"


def test_control_characters_reach_neither_terminal_nor_messages(
    copy: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    card = json.loads((copy / "card.json").read_text()) | {"model_name": FORGED}
    (copy / "card.json").write_text(json.dumps(card))
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", str(copy), "--json"]) == 0
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert sum(line.startswith("model_name") for line in printed.split("\n")) == 1
    with pytest.raises(ArtifactError) as caught:
        find(IDENTITY, 1, 99.0, model_name="m", artifact=copy)
    assert str(caught.value).isprintable()
    with pytest.raises(ArtifactError) as caught:
        find(IDENTITY, 1, 99.0, model_name="m", registries=[copy.parent.parent])
    assert all(line.isprintable() for line in str(caught.value).split("\n"))
    assert not any(line.startswith("model_name") for line in str(caught.value).split("\n"))


def test_text_of_any_language_is_left_as_it_is() -> None:
    assert printable("Größe 模型 x²") == "Größe 模型 x²"
    assert printable(FORGED).isascii()
