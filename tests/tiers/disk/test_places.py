"""Directories that are known by a descriptor: few calls, and no way out of the root."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.tiers.disk import filesystem
from kvtc_vllm.tiers.disk.filesystem import MOST_PLACES, OsFileSystem
from tests.reliability.blobs import blob_of, key_of
from tests.tiers.disk.test_store import open_store

FLAGS = os.O_RDWR | os.O_CREAT
FILE = "chunk"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    (made / "space" / "ab").mkdir(mode=0o700, parents=True)
    os.chmod(made, 0o700)
    os.chmod(made / "space", 0o700)
    return made


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    made = tmp_path / "outside"
    made.mkdir(mode=0o700)
    return made


def write(fs: OsFileSystem, directory: Path) -> None:
    """A file in a directory of it."""
    fs.close(fs.open(f"{directory}/{FILE}", FLAGS))


def known(root: Path, *places: Path) -> OsFileSystem:
    """One that has used these directories."""
    fs = OsFileSystem(str(root))
    for place in places:
        write(fs, place)
        fs.unlink(f"{place}/{FILE}")
    return fs


def counted(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """Directories that are opened meanwhile."""
    opened = []
    real = os.open

    def count(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECTORY:
            opened.append(path)
        return real(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.os, "open", count)
        call()
    return len(opened)


def test_a_write_opens_no_directory_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "root", pages=1000)
    keys = [b"\0" + key_of(number)[1:] for number in range(3)]
    blobs = [blob_of(key) for key in keys]
    assert counted(monkeypatch, lambda: store.write(keys[0], blobs[0])) > 0
    assert counted(monkeypatch, lambda: store.write(keys[1], blobs[1])) == 0
    # One more where the two characters of the key's directory are others.
    other = b"\1" + keys[2][1:]
    store.write(other, blob_of(other))
    for number in range(2, MOST_PLACES + 2):
        key = bytes([number]) + keys[2][1:]
        os.mkdir(tmp_path / "root" / store.namespace.hex() / key.hex()[:2], 0o700)
        assert counted(monkeypatch, lambda k=key: store.write(k, blob_of(k))) == 1  # type: ignore[misc]
    store.close()


def test_descriptors_are_bounded_and_end_with_the_file_system(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    places = [root / "space" / f"{number:02x}" for number in range(3 * MOST_PLACES)]
    for place in places:
        place.mkdir(mode=0o700)
    fs = known(root, *places)
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= MOST_PLACES
    del fs
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("place", ["space", "space/ab"])
def test_a_link_in_the_place_of_a_known_directory_leads_nowhere(
    root: Path, outside: Path, place: str
) -> None:
    fs = known(root, root / "space" / "ab")
    (outside / "ab").mkdir(mode=0o700)
    os.rename(root / place, root.parent / "aside")
    os.symlink(outside, root / place)
    with pytest.raises(OSError):
        write(fs, root / "space" / "ab")
    assert not list(outside.rglob(FILE))
    assert not list((root.parent / "aside").rglob(FILE))


@pytest.mark.parametrize("place", ["space", "space/ab"])
def test_a_known_directory_that_was_made_anew_is_the_new_one(root: Path, place: str) -> None:
    fs = known(root, root / "space" / "ab")
    shutil.move(root / place, root / "aside")
    (root / "space" / "ab").mkdir(mode=0o700, parents=True)
    os.chmod(root / "space", 0o700)
    write(fs, root / "space" / "ab")
    assert (root / "space" / "ab" / FILE).exists()
    assert not list((root / "aside").rglob(FILE))


def test_a_known_directory_that_is_gone_is_missing(root: Path) -> None:
    fs = known(root, root / "space" / "ab")
    (root / "space" / "ab").rmdir()
    with pytest.raises(FileNotFoundError):
        write(fs, root / "space" / "ab")
    fs.mkdir(str(root / "space" / "ab"))
    write(fs, root / "space" / "ab")


@pytest.mark.parametrize("place", ["", "space", "space/ab"])
def test_a_known_directory_that_others_may_write_is_refused(root: Path, place: str) -> None:
    """One on the way to it as soon as something else is in its place."""
    fs = known(root, root, root / "space", root / "space" / "ab")
    os.chmod(root / place, 0o777)
    with pytest.raises(PermissionError, match="others may write it"):
        write(fs, root / place)
    if place == "":
        os.rename(root / "space", root / "aside")
        (root / "space" / "ab").mkdir(mode=0o700, parents=True)
        with pytest.raises(PermissionError, match="others may write it"):
            write(fs, root / "space" / "ab")
    os.chmod(root / place, 0o700)
    write(fs, root / place)


def test_a_root_may_be_reached_by_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    fs = known(link, link, link / "space" / "ab")
    write(fs, link)
    write(fs, link / "space" / "ab")
    assert (root / "space" / "ab" / FILE).exists()
