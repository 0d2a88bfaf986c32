"""Fingerprints that are remembered, in the process and on disk, and when they must not be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from kvtc_vllm.artifact import identity, remembered
from kvtc_vllm.artifact.identity import weights_fingerprint

ROOT = Path(__file__).parents[2]
AN_HOUR_NS = 3600 * 10**9


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file; nothing is remembered yet."""
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_known", {})
    return tmp_path / "cache" / remembered.CACHE_FILE


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with one weight file of 3000 bytes."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.bin").write_bytes(b"old" * 1000)
    return directory


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour after all files were written."""
    now = time.time_ns
    clock = SimpleNamespace(**vars(time) | {"time_ns": lambda: now() + AN_HOUR_NS})
    monkeypatch.setattr(remembered, "time", clock)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weight files read."""
    found: list[str] = []
    whole = identity._whole

    def note(file: BinaryIO) -> Iterator[bytes]:
        found.append(file.name)
        return whole(file)

    monkeypatch.setattr(identity, "_whole", note)
    return found


def forget() -> None:
    """As a new process."""
    remembered._known.clear()


def test_weights_are_read_once_a_process(
    cache: Path, model: Path, later: None, reads: list[str]
) -> None:
    first = weights_fingerprint(model)
    cache.unlink()
    assert weights_fingerprint(model) == first
    assert len(reads) == 1


def test_weights_are_read_once_for_all_processes(
    cache: Path, model: Path, later: None, reads: list[str]
) -> None:
    first = weights_fingerprint(model)
    code = (
        "import sys; from pathlib import Path; "
        "from kvtc_vllm.artifact import identity, remembered; "
        "remembered.FRESH_NS = -10**18; "
        "identity._whole = lambda file: sys.exit('read again'); "
        "print(identity.weights_fingerprint(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(model)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == (
        first + "\n"
    )
    assert len(reads) == 1


def test_ranks_that_start_together_read_the_weights_once(
    cache: Path, model: Path, tmp_path: Path
) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; "
        "from kvtc_vllm.artifact import identity, remembered\n"
        "remembered.FRESH_NS = -10**18\n"
        "whole = identity._whole\n"
        "def slow(file):\n"
        "    with open(sys.argv[2], 'a') as log: log.write('read\\n')\n"
        "    time.sleep(0.5)\n"
        "    return whole(file)\n"
        "identity._whole = slow\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(identity.weights_fingerprint(Path(sys.argv[1])))\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, str(model), str(log)]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("go\n")
        rank.stdin.flush()
    found = {rank.communicate()[0] for rank in ranks}
    assert len(found) == 1
    assert log.read_text() == "read\n"


def test_another_content_of_the_same_size_and_time_is_noticed(
    cache: Path, model: Path, later: None, tmp_path: Path
) -> None:
    path = model / "model.bin"
    before = path.stat()
    first = weights_fingerprint(model)
    other = tmp_path / "other.bin"
    other.write_bytes(b"new" * 1000)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.copy2(other, path)  # as cp -p does: the same inode
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    second = weights_fingerprint(model)
    assert second != first
    forget()
    assert weights_fingerprint(model) == second


def test_another_file_of_the_same_size_and_time_is_noticed(
    cache: Path, model: Path, later: None, tmp_path: Path
) -> None:
    path = model / "model.bin"
    before = path.stat()
    first = weights_fingerprint(model)
    other = tmp_path / "other.bin"
    other.write_bytes(b"new" * 1000)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)  # as rsync -a and archives do
    assert weights_fingerprint(model) != first


@pytest.mark.parametrize("field", remembered.FileState._fields)
def test_every_part_of_a_file_s_state_counts(field: str, cache: Path, later: None) -> None:
    state = remembered.FileState("model.bin", 1, 2, 3, 4, 5)
    changed = state._replace(**{field: "other.bin" if field == "name" else 99})
    assert remembered.remember([state], "whole", lambda: "a" * 32) == "a" * 32
    assert remembered.remember([changed], "whole", lambda: "b" * 32) == "b" * 32
    assert remembered.remember([state], "sampled", lambda: "c" * 32) == "c" * 32
    forget()
    assert remembered.remember([state], "whole", lambda: "d" * 32) == "a" * 32


@pytest.mark.parametrize("attribute", ["mtime_ns", "ctime_ns"])
@pytest.mark.parametrize("age_ns", [-AN_HOUR_NS, 0, 10**9])
def test_files_changed_just_now_are_not_remembered(
    attribute: str, age_ns: int, cache: Path
) -> None:
    times = {"mtime_ns": 0, "ctime_ns": 0} | {attribute: time.time_ns() - age_ns}
    state = remembered.FileState("model.bin", 1, 2, 3, **times)
    assert remembered.remember([state], "whole", lambda: "a" * 32) == "a" * 32
    assert remembered.remember([state], "whole", lambda: "b" * 32) == "b" * 32
    assert not cache.exists()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    target = path.with_name("elsewhere.json")
    target.write_text("{}")
    path.symlink_to(target)


BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "not JSON": lambda path: path.write_bytes(b"\xff\x00"),
    "deep": lambda path: path.write_bytes(b'{"a":{"b":' + b"[" * 100_000),
    "other JSON": lambda path: path.write_text("[1]"),
    "no fingerprint": lambda path: path.write_text(
        path.read_text().replace('"fingerprint":"', '"fingerprint":"../')
    ),
    "too large": lambda path: path.write_bytes(path.read_bytes().ljust(2**20 + 1)),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), pipe(path)),
    "a link": lambda path: (path.unlink(), link(path)),
}


@pytest.mark.parametrize("damage", sorted(BAD))
def test_a_bad_cache_is_ignored(
    damage: str, cache: Path, model: Path, later: None, reads: list[str]
) -> None:
    first = weights_fingerprint(model)
    BAD[damage](cache)
    forget()
    assert weights_fingerprint(model) == first
    assert len(reads) == 2
    assert list(cache.parent.glob("*.tmp")) == []
    if damage.startswith("a "):
        assert (cache.is_symlink(), cache.is_dir(), cache.is_fifo()) == (
            damage == "a link",
            damage == "a directory",
            damage == "a pipe",
        )
        return
    forget()
    assert weights_fingerprint(model) == first
    assert len(reads) == 2  # the file is ours, so it was mended


def test_somebody_else_s_cache_is_ignored_and_left_alone(
    cache: Path, model: Path, later: None, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_fingerprint(model)
    theirs = cache.read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    (model / "model.bin").write_bytes(b"new" * 1000)
    weights_fingerprint(model)
    forget()
    weights_fingerprint(model)
    assert len(reads) == 3
    assert cache.read_bytes() == theirs


@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_cache_that_cannot_be_written_is_no_error(
    call: str, cache: Path, model: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by permissions: the tests may run as root."""
    expected = weights_fingerprint(model)
    shutil.rmtree(cache.parent)
    forget()
    original = getattr(os, call)

    def refuse(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith(str(cache.parent)):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr(os, call, refuse)
    assert weights_fingerprint(model) == expected
    assert not cache.exists()
    assert not cache.parent.exists() or list(cache.parent.glob("*.tmp")) == []


def test_a_process_without_a_home_remembers_nothing(
    model: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(remembered.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert len(weights_fingerprint(model)) == 32


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(remembered.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert remembered.cache_directory() == tmp_path / ".cache" / "kvtc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert remembered.cache_directory() == tmp_path / "xdg" / "kvtc"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert remembered.cache_directory() == tmp_path / ".cache" / "kvtc"
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "own"))
    assert remembered.cache_directory() == tmp_path / "own"


def test_what_was_used_longest_ago_is_forgotten_first(
    cache: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "MAX_ENTRIES", 2)
    states = [remembered.FileState(str(number), 1, 2, 3, 4, 5) for number in range(3)]

    def use(number: int, computed: str = "") -> str:
        forget()
        return remembered.remember([states[number]], "whole", lambda: computed * 32)

    def age(seconds: int) -> None:
        entries = json.loads(cache.read_text())
        for entry in entries.values():
            entry["used"] -= seconds
        cache.write_text(json.dumps(entries))

    use(0, "a")
    age(3 * 86400)
    use(1, "b")
    age(2 * 86400)
    assert use(0) == "a" * 32  # now used later than the other
    use(2, "c")
    assert len(json.loads(cache.read_text())) == 2
    assert (use(0, "d"), use(2, "d"), use(1, "d")) == ("a" * 32, "c" * 32, "d" * 32)


def test_a_lock_that_cannot_be_had_is_waited_for_no_longer_than_that(
    cache: Path, model: Path, later: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "WAIT_SECONDS", 0.1)
    directory = remembered.cache_directory()
    assert directory is not None
    with remembered._locked(directory):
        assert len(weights_fingerprint(model)) == 32
