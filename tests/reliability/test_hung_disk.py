"""A disk that does not answer: the caller goes on in time, and so does the process's end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtc_vllm.tiers.disk import DiskError, DiskStore, IoPool
from tests.reliability.blobs import NAMESPACE, blob_of, key_of
from tests.reliability.faults import HangingFileSystem

ROOT = Path(__file__).parents[2]
DEADLINE = 2.0
KEY = key_of(0)


def test_a_load_is_given_up_within_its_deadline_and_a_tenth(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    store = DiskStore(tmp_path, NAMESPACE, capacity=2**20, min_free=0, filesystem=filesystem)
    store.write(KEY, blob_of(KEY))
    filesystem.hang = True
    pool = IoPool(threads=1, queue_limit=4)
    began = time.monotonic()
    running = pool.submit(lambda: store.read(KEY), DEADLINE)
    waiting = pool.submit(lambda: store.read(KEY), DEADLINE)
    for handle in (running, waiting):
        with pytest.raises(DiskError, match="deadline"):
            handle.wait()
    assert DEADLINE <= time.monotonic() - began <= DEADLINE * 1.1
    # The next ones do not even wait.
    assert pool.stalled
    began = time.monotonic()
    with pytest.raises(DiskError, match="stalled"):
        pool.submit(lambda: store.read(KEY), DEADLINE)
    assert time.monotonic() - began < DEADLINE / 4
    assert pool.close(seconds=0.1) == 1
    filesystem.release()


def test_a_stalled_pool_works_again_when_the_disk_does(tmp_path: Path) -> None:
    filesystem = HangingFileSystem("pread")
    filesystem.hang = False
    store = DiskStore(tmp_path, NAMESPACE, capacity=2**20, min_free=0, filesystem=filesystem)
    store.write(KEY, blob_of(KEY))
    filesystem.hang = True
    pool = IoPool(threads=2, queue_limit=4)
    handles = [pool.submit(lambda: store.read(KEY), 0.5) for _ in range(2)]
    for handle in handles:
        with pytest.raises(DiskError, match="deadline"):
            handle.wait()
    assert pool.stalled
    filesystem.release()
    ends = time.monotonic() + 5
    while pool.hung and time.monotonic() < ends:
        time.sleep(0.005)
    assert pool.submit(lambda: store.read(KEY), 5).wait() == blob_of(KEY)
    assert pool.close() == 0


def test_reads_do_not_wait_for_a_writer_that_hangs_with_the_lock(tmp_path: Path) -> None:
    sound = DiskStore(tmp_path, NAMESPACE, capacity=2**20, min_free=0, lock_wait_seconds=0.1)
    sound.write(KEY, blob_of(KEY))
    filesystem = HangingFileSystem("truncate")
    hanging = DiskStore(tmp_path, NAMESPACE, capacity=2**20, min_free=0, filesystem=filesystem)
    pool = IoPool(threads=1, queue_limit=0)
    write = pool.submit(lambda: hanging.write(key_of(1), blob_of(key_of(1))), 5)
    while "truncate" not in filesystem.calls:
        time.sleep(0.001)
    assert sound.read(KEY) == blob_of(KEY)
    assert sound.touch([KEY]) == []
    with pytest.raises(DiskError, match="busy"):
        sound.write(key_of(2), blob_of(key_of(2)))
    filesystem.release()
    write.wait()
    sound.write(key_of(2), blob_of(key_of(2)))


def test_a_process_ends_although_all_its_threads_hang(tmp_path: Path) -> None:
    """They hang in the kernel: a pipe that is read as if it were the chunk."""
    DiskStore(tmp_path, NAMESPACE, capacity=2**20, min_free=0).write(KEY, blob_of(KEY))
    code = (
        "import os, sys\n"
        "from kvtc_vllm.tiers.disk import DiskError, DiskStore, IoPool, OsFileSystem\n"
        "from tests.reliability.blobs import NAMESPACE, key_of\n"
        "store = DiskStore(sys.argv[1], NAMESPACE, capacity=2**20, min_free=0)\n"
        "pipe, _ = os.pipe()\n"
        "OsFileSystem.pread = lambda self, fd, length, offset: os.read(pipe, length)\n"
        "pool = IoPool(threads=2, queue_limit=4)\n"
        "handles = [pool.submit(lambda: store.read(key_of(0)), 0.1) for _ in range(2)]\n"
        "for handle in handles:\n"
        "    try:\n"
        "        handle.wait()\n"
        "    except DiskError as error:\n"
        "        print(error.reason)\n"
        "pool.close(seconds=0.1)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout.split()) == (0, ["deadline", "deadline"])
