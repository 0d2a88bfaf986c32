"""Things that are no plain files, in every place of a tier: no hang, nothing outside touched."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord
from kvtc_vllm.tiers.disk.survey import Survey
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of
from tests.reliability.faults import WrappedFileSystem

ROOT = Path(__file__).parents[2]
RECORD = NamespaceRecord(model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1)
NAME = NAMESPACE.hex()
A, B, C = (key_of(n) for n in range(3))
PAGE = 4096


def blob(key: bytes) -> bytes:
    return blob_of(key, longest=4000)


def open_store(root: Path, **more) -> DiskStore:
    more.setdefault("capacity", 100 * PAGE)
    return DiskStore(root, NAMESPACE, min_free=0, namespace_record=RECORD, **more)


def path_of(key: bytes) -> str:
    return f"{NAME}/{key.hex()[:2]}/{key.hex()}.kvtc"


def reason(operation: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(DiskError) as caught:
        operation(*arguments)
    return caught.value.reason


def outcome(store: DiskStore, key: bytes) -> str:
    """ "read", or the reason why not."""
    try:
        assert store.read(key) == blob(key)
    except DiskError as error:
        return error.reason
    return "read"


class Outside:
    """A directory beside the tier with things that must not change."""

    def __init__(self, place: Path) -> None:
        self.path = place
        place.mkdir()
        (place / "important.tmp").write_bytes(b"important")
        (place / "1-0123456789abcdef.tmp").write_bytes(b"important too")
        (place / f"{A.hex()}.kvtc").write_bytes(blob(B))
        self.before = self.state()

    def state(self) -> dict[str, tuple[bytes, int]]:
        return {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in self.path.iterdir()
        }


def fifo(path: Path, outside: Outside) -> None:
    os.mkfifo(path)


def socket_file(path: Path, outside: Outside) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        short = outside.path.parent / "socket"  # a longer one has no room in an address
        server.bind(str(short))
    short.rename(path)


def link_to_file(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.path / "important.tmp")


def link_to_directory(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.path)


def dangling(path: Path, outside: Outside) -> None:
    path.symlink_to(outside.path / "nothing")


def hard_link(path: Path, outside: Outside) -> None:
    path.hardlink_to(outside.path / "important.tmp")


def empty_directory(path: Path, outside: Outside) -> None:
    path.mkdir()


def full_directory(path: Path, outside: Outside) -> None:
    path.mkdir()
    (path / "somebody's").write_bytes(b"kept")


def device(path: Path, outside: Outside) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("this user cannot make devices")


KINDS = (
    fifo,
    socket_file,
    link_to_file,
    link_to_directory,
    dangling,
    hard_link,
    empty_directory,
    full_directory,
    device,
)
PLACES = (
    "ledger.json",
    "layout.json",
    NAME,
    f"{NAME}/namespace.json",
    f"{NAME}/in-use",
    f"{NAME}/removals",
    f"{NAME}/tmp",
    f"{NAME}/tmp/1-0123456789abcdef.tmp",
    f"{NAME}/{A.hex()[:2]}",
    path_of(A),
)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Whatever waits for the other end of a pipe is ended."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(scratch: Path) -> Outside:
    return Outside(scratch / "outside")


@pytest.fixture
def tier(scratch: Path) -> Path:
    root = scratch / "tier"
    store = open_store(root)
    for key in (A, B):
        store.write(key, blob(key))
    store.close()
    return root


def put(kind: Callable[[Path, Outside], None], path: Path, outside: Outside) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind(path, outside)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_is_anywhere_the_engine_starts_and_stores(
    kind: Callable[[Path, Outside], None], place: str, tier: Path, outside: Outside
) -> None:
    put(kind, tier / place, outside)
    store = open_store(tier)
    store.scan()
    for key in (A, B, C):
        assert outcome(store, key) in ("read", "missing", "foreign", "corrupt")
        if (kind, place, key) == (full_directory, path_of(A), A):
            assert reason(store.write, key, blob(key)) == "foreign"
        else:
            store.write(key, blob(key))
            assert outcome(store, key) == "read"
    store.scan()
    assert store.used() == disk.ledger_bytes(tier)
    store.close()
    assert main(["inspect", str(tier)]) == main(["gc", str(tier)]) == 0
    main(["verify", str(tier), "--delete"])
    Survey(tier).drop(NAME)
    assert outside.state() == outside.before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_in_a_chunk_s_place_heals_or_is_forgotten_and_never_counts_as_stored(
    kind: Callable[[Path, Outside], None], tier: Path, outside: Outside
) -> None:
    store = open_store(tier)
    put(kind, tier / path_of(A), outside)
    assert reason(store.read, A) in ("foreign", "corrupt")
    if kind is full_directory:
        assert [reason(store.write, A, blob(A)) for _ in range(3)] == ["foreign"] * 3
        assert "writes_present" not in store.counts()
    else:
        store.write(A, blob(A))
        assert store.read(A) == blob(A)
    put(kind, tier / path_of(A), outside)
    if kind is not full_directory:
        store.write(A, blob(A))  # without a read before
        assert store.read(A) == blob(A)
        assert store.counts()["writes"] == 2
    assert outside.state() == outside.before


def test_pipes_in_chunks_places_do_not_stop_the_readers(tier: Path) -> None:
    store = open_store(tier)
    for key in (A, B):
        (tier / path_of(key)).unlink()
        os.mkfifo(tier / path_of(key))
    began = time.monotonic()
    assert [reason(store.read, key) for key in (A, B)] == ["foreign"] * 2
    assert time.monotonic() - began < 5
    assert [reason(store.read, key) for key in (A, B)] == ["missing"] * 2


def test_only_our_own_temporaries_are_removed(tier: Path) -> None:
    place = tier / NAME / "tmp"
    kept = ("notes.tmp", "1-x.tmp", "1-0123456789ABCDEF.tmp", "x1-0123456789abcdef.tmp", ".tmp")
    for name in (*kept, "1-0123456789abcdef.tmp"):
        (place / name).write_bytes(b"x")
    open_store(tier).scan()
    assert sorted(os.listdir(place)) == sorted(kept)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
@pytest.mark.parametrize("place", ["", NAME, f"{NAME}/tmp", f"{NAME}/{A.hex()[:2]}"])
def test_a_directory_that_others_may_write_is_refused(mode: int, place: str, tier: Path) -> None:
    os.chmod(tier / place, mode)
    if place in ("", NAME, f"{NAME}/tmp"):
        with pytest.raises(DiskError, match=f"mode {mode:04o}.*chmod go-w") as caught:
            open_store(tier)
        assert caught.value.reason == "permission"
        assert str(tier / place) in str(caught.value)
    else:
        assert reason(open_store(tier).read, A) == "permission"
    if place == "":
        with pytest.raises(DiskError, match="chmod go-w"):
            Survey(tier)
    assert (tier / path_of(A)).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tier: Path) -> None:
    os.chown(tier, 65534, 65534)
    with pytest.raises(DiskError, match="belongs to uid 65534, and this process runs as uid 0"):
        open_store(tier)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_s_directory_may_be_read_by_others_but_not_used(tier: Path) -> None:
    code = (
        "import os, sys\n"
        "from kvtc_vllm.tiers.disk import DiskError, DiskStore\n"
        "os.seteuid(65534)\n"
        "try:\n"
        "    DiskStore(sys.argv[1], bytes(16), capacity=1 << 20, min_free=0)\n"
        "except DiskError as error:\n"
        "    print(error.reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tier)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["permission"]


def test_everything_that_is_made_is_the_user_s_own(scratch: Path) -> None:
    before = os.umask(0)
    try:
        store = open_store(scratch / "new" / "tier")
        store.write(A, blob(A))
        shutil.rmtree(scratch / "new" / "tier")
        store.write(A, blob(A))
    finally:
        os.umask(before)
    for path in (scratch / "new" / "tier", *(scratch / "new" / "tier").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_swapped_directory_takes_no_call_outside(tier: Path, outside: Outside) -> None:
    """While the store is open, and its paths were good when it was opened."""
    store = open_store(tier)
    for name in (f"{A.hex()[:2]}", "tmp"):
        place = tier / NAME / name
        place.rename(tier / NAME / f"was-{name}")
        place.symlink_to(outside.path)
        for key in (A, B, C):
            for operation in (
                lambda key=key: store.read(key),
                lambda key=key: store.write(key, blob(key)),
                lambda key=key: store.remove([key]),
            ):
                with suppress(DiskError):
                    operation()
        store.touch([A, B, C])
        store.scan()
        assert outside.state() == outside.before


def test_another_namespace_s_directory_as_a_link_is_no_namespace(
    tier: Path, outside: Outside
) -> None:
    (tier / OTHER_NAMESPACE.hex()).symlink_to(outside.path)
    store = open_store(tier, capacity=3 * PAGE)
    for number in range(9):
        store.write(key_of(number), blob(key_of(number)))
    assert Survey(tier).namespaces() == [NAME]
    assert outside.state() == outside.before


class LateFileSystem(WrappedFileSystem):
    """Saw something in the way that another process has cleared meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"mkdir": False, "open": False}

    def perform(self, number, name, real, args):
        ends = {"mkdir": "/tmp", "open": "/ledger.json"}.get(name)
        if ends is not None and args[0].endswith(ends) and not self.seen[name]:
            self.seen[name] = True
            raise OSError(errno.EEXIST, "something was there")
        return real(*args)


def test_what_another_process_has_just_made_does_not_go_aside(tier: Path) -> None:
    filesystem = LateFileSystem()
    store = open_store(tier, filesystem=filesystem)
    assert store.read(A) == blob(A)
    assert all(filesystem.seen.values())
    assert list(tier.glob("set-aside-*")) == []
    assert {entry.key for entry in store.scan()} == {A, B}


@pytest.mark.parametrize("name", [".kvtc", f"{'ab' * 101}.kvtc", f"{'ab' * 120}.kvtc"])
@pytest.mark.parametrize("place", ["ab", A.hex()[:2]])
def test_a_name_that_no_key_has_is_left_alone(
    tmp_path: Path, name: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty one has no first byte, by which keys are sorted everywhere."""
    store = open_store(tmp_path)
    store.write(A, blob(A))
    store.close()
    strange = tmp_path / NAME / place / name
    strange.parent.mkdir(mode=0o700, exist_ok=True)
    strange.write_bytes(blob(B))
    for _ in range(2):  # the second time with a list of the files
        again = open_store(tmp_path)
        assert [key for key, _ in again.inventory()] == [A]
        assert again.read(A) == blob(A)
        again.keep_list(time.monotonic() + 20)
        again.close()
    assert [chunk.key for chunk in Survey(tmp_path).chunks(NAME)] == [A]
    assert main(["verify", str(tmp_path)]) == 1  # what is in the files is no container
    assert "1 chunks, 1 bad" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["gc", str(tmp_path)]) == 0
    capsys.readouterr()
    assert strange.read_bytes() == blob(B)
