"""Chunks that are halved on disk: the smaller blob takes the place of the other, or it's a miss."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

pytest.importorskip("vllm")
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.offload.disk_news import DiskHalved, DiskNews
from kvtc_vllm.tiers.disk.layout import disk_bytes
from kvtc_vllm.tiers.keys import RecordKey
from tests.connector.test_disk_side import KEYS, gather, open_side, write
from tests.reliability import disk as on_disk
from tests.reliability.blobs import blob_of
from tests.reliability.faults import FaultyFileSystem, WrappedFileSystem

KEY = RecordKey(next(key for key in KEYS if len(blob_of(key)) > 12_000))
HEAD, CHECKSUM = 76, 16


class Halver:
    """Leaves half of what is between head and checksum; twice at most."""

    most_times = 2

    def times_halved(self, blob: bytes) -> int:
        return {len(self.after(times)): times for times in range(3)}[len(blob)]

    def halve(self, blob: bytes, key: bytes) -> bytes:
        if self.times_halved(blob) == self.most_times:
            raise CodecError("ratio", "small enough")
        content = blob[: HEAD + (len(blob) - HEAD - CHECKSUM) // 2]
        return content + xxhash.xxh3_128_digest(content)

    def after(self, times: int) -> bytes:
        blob = blob_of(KEY)
        for _ in range(times):
            content = blob[: HEAD + (len(blob) - HEAD - CHECKSUM) // 2]
            blob = content + xxhash.xxh3_128_digest(content)
        return blob


class Unreadable(Halver):
    def halve(self, blob: bytes, key: bytes) -> bytes:
        raise ContainerError("entropy", "cannot be read")


AS_IT_WAS = DiskHalved(KEY, 2, last=True)


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Any]:
    made = open_side(tmp_path)
    write(made, KEY)
    yield made
    made.close((), 5)


def halve(side: Any, halver: Halver) -> DiskNews:
    """News until the outcome is among them."""
    side.halve([KEY], halver)
    outcomes: list[DiskHalved] = []
    take = side.take_news

    def collect() -> DiskNews:
        news: DiskNews = take()
        outcomes.extend(news.halved)
        return news

    class Collecting:
        take_news = staticmethod(collect)

    news = gather(Collecting(), lambda _: bool(outcomes))
    news.halved = outcomes
    return news


def read(side: Any) -> bytes | None:
    side.read([KEY])
    news = gather(side, lambda news: bool(news.read or news.failed))
    return news.read[0][1] if news.read else None


def test_twice_and_no_further(side: Any, tmp_path: Path) -> None:
    halver = Halver()
    for times in (1, 2):
        news = halve(side, halver)
        size = disk_bytes(len(halver.after(times)))
        assert news.halved == [DiskHalved(KEY, times, times == 2, size)]
        assert news.lost == []
        assert read(side) == halver.after(times)
        assert side._namespace.store.used() == size
        assert len(on_disk.chunk_files(tmp_path)) == 1
    news = halve(side, halver)
    assert (news.halved, news.lost, news.errors) == ([AS_IT_WAS], [], {})
    assert read(side) == halver.after(2)


def test_a_chunk_that_is_gone_or_unreadable_is_a_miss(side: Any, tmp_path: Path) -> None:
    news = halve(side, Unreadable())
    assert (news.halved, news.lost) == ([AS_IT_WAS], [KEY])
    assert news.errors == {"corrupt": 1}
    (path,) = on_disk.chunk_files(tmp_path)
    path.unlink()
    news = halve(side, Halver())
    assert (news.halved, news.lost) == ([AS_IT_WAS], [KEY])
    assert news.errors == {"missing": 1}


def test_a_damaged_file_is_removed(side: Any, tmp_path: Path) -> None:
    (path,) = on_disk.chunk_files(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    news = halve(side, Halver())
    assert KEY in news.lost
    assert news.errors == {"corrupt": 1}
    assert read(side) is None


def test_wherever_the_disk_fails_it_is_the_chunk_or_a_miss(tmp_path: Path) -> None:
    """Each call of the file system in turn; nothing is left that is neither."""
    halver = Halver()
    counting = WrappedFileSystem()
    side = open_side(tmp_path / "count", counting)
    write(side, KEY)
    first = len(counting.calls)
    halve(side, halver)
    last = len(counting.calls)
    side.close((), 5)
    found = set()
    for number in range(first + 1, last + 1, 3):
        root = tmp_path / str(number)
        side = open_side(root, FaultyFileSystem(errno.EIO, number))
        write(side, KEY)
        halve(side, halver)
        side.close((), 5)
        again = open_side(root)
        again.inventory()
        blob = read(again)
        found.add(None if blob is None else len(blob))
        assert blob in (None, blob_of(KEY), halver.after(1))
        if blob is not None:
            assert again._namespace.store.used() == disk_bytes(len(blob))
        again.close((), 5)
    assert len(blob_of(KEY)) in found or len(halver.after(1)) in found


def test_after_a_reset_nothing_is_told(side: Any, tmp_path: Path) -> None:
    side.leave(1)
    side.halve([KEY], Halver())
    assert side.take_news().halved == []
    assert [path.stat().st_size for path in on_disk.chunk_files(tmp_path)] == [len(blob_of(KEY))]
