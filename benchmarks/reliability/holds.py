"""How long Python's lock is held at once where the tiers go through very many chunks.

    python -m benchmarks.reliability.holds --label after [--files 1000000] [--records 5000000]
        [--parts plain,scan,write,handshake,index,lost] [--interval 0.005] [--rounds 1]
        [--root DIR] [--places 3] [--out FILE]

A thread sleeps a millisecond again and again and wants the lock each time. A *hold* is the
processor time of the working thread between two of its turns: so other programs do not count, and
the millisecond of sleep does. Python's own interval stays as it is: it takes the lock from a thread
after 5 ms at the soonest, so up to 6 ms are not the tiers'. Loops that ask for shorter turns
(`tiers/disk/turns.py`) show less on a machine that has a core for the probe. With a short
`--interval` Python gives the lock away almost at once where it can, and what is left above the
millisecond is where it cannot: single calls, the tiers' own. Run as root, the probe has priority
over other programs; else its own waiting for a core is counted too. A virtual machine's cores are
taken away for tens of milliseconds now and then, also while the probe waits for one. So with
`--rounds` every part runs so often, and of each row the round with the shortest longest hold is
kept: what the tiers hold, they hold in every round.

Of the indexes no hold is told but the longest call, in processor time of its thread: the scheduler
is single-threaded, and its step waits for the whole of it. So is "lost": the longest step of those
that take over that chunks left the disk, all in one or in the pieces in which a worker tells them.

`--places` prints where the working thread was at the end of the longest holds: the call just before
is the one that took so long. Each part runs in a process of its own. Results are added to
holds.json under the label.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reliability.scale_parts import CHUNK_BYTES, _make_files, key_of

if TYPE_CHECKING:
    from kvtc_vllm.offload.disk_losses import DiskLosses
    from kvtc_vllm.offload.tier_indexes import TierIndexes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SLEEP_SECONDS = 0.001
LOST = 60_000
PLAIN_STEPS = 100_000_000
"""Some seconds."""
LONG_SECONDS = 0.006
"""Above this a hold is not Python's own interval."""
Row = dict[str, Any]


class Holds:
    """The probe: measures what the thread that made it does, until `end`."""

    def __init__(self) -> None:
        self._worker = threading.get_ident()
        self._stop = threading.Event()
        self._found: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        with suppress(PermissionError):  # else it is late itself where other programs run
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        clock = time.pthread_getcpuclockid(self._worker)
        last = time.clock_gettime(clock)
        while not self._stop.is_set():
            time.sleep(SLEEP_SECONDS)
            now = time.clock_gettime(clock)
            self._found.append((now - last, ""))
            if now - last > SLEEP_SECONDS:
                self._found[-1] = (now - last, _place(sys._current_frames()[self._worker]))
            last = time.clock_gettime(clock)

    def end(self, places: int) -> Row:
        """The longest hold in ms, how many were long, and where the longest ended."""
        self._stop.set()
        self._thread.join()
        longest = sorted(self._found, reverse=True)[:places]
        for seconds, place in longest:
            print(f"    {1e3 * seconds:8.1f} ms  {place}", file=sys.stderr, flush=True)
        return {
            "longest, ms": round(1e3 * max((hold for hold, _ in self._found), default=0.0), 1),
            "longer than 6 ms": sum(hold > LONG_SECONDS for hold, _ in self._found),
        }


def _place(frame: Any) -> str:
    """Innermost functions and lines of ours."""
    found: list[str] = []
    while frame is not None and len(found) < 4:
        found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


class Table(dict[str, Row]):
    """Rows of one part, said as they come."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self._places = places

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """Hold times of a call; what it returns."""
        gc.collect()
        gc.freeze()  # as vLLM does after its start: what is imported is not looked through again
        worked = time.thread_time()
        probe = Holds()
        found = call()
        row = probe.end(self._places)
        row["all, s"] = round(time.thread_time() - worked, 2)
        self[name] = row
        print(f"{name}: {json.dumps(row)}", file=sys.stderr, flush=True)
        return found

    def note(self, name: str, seconds: float) -> None:
        """The longest of many calls."""
        self[name] = {"longest call, ms": round(1e3 * seconds, 2)}
        print(f"{name}: {json.dumps(self[name])}", file=sys.stderr, flush=True)


def plain(table: Table, size: int, root: Path) -> None:
    """What the probe shows of a loop that holds the lock nowhere, on this machine."""

    def count() -> None:
        number = 0
        while number < PLAIN_STEPS:
            number += 1

    table.measure("a plain loop", count)


def scan(table: Table, size: int, root: Path) -> None:
    """What a start does with a namespace of `size` files, and what a reset to it does."""
    from kvtc_vllm.offload.namespace import Namespace
    from kvtc_vllm.tiers.disk import DiskStore
    from tests.reliability.blobs import NAMESPACE

    store: Any = DiskStore(root, NAMESPACE, capacity=1 << 50, min_free=0)
    namespace = Namespace(lambda: store)
    until = time.monotonic() + 3600
    table.measure("start without a list", lambda: namespace.listed(until))
    table.measure("list of files", lambda: store.keep_list(until))
    table.measure("start with a list", lambda: namespace.listed(until))
    store.close()


def write(table: Table, size: int, root: Path) -> None:
    """What a full tier does: a write that surveys, and leaving a generation's namespace."""
    from kvtc_vllm.tiers.disk import DiskStore
    from tests.reliability.blobs import NAMESPACE, blob_of
    from tests.reliability.blobs import key_of as blob_key

    used = size * (-(-CHUNK_BYTES // 4096) * 4096)
    key = blob_key(1)
    counted: Any = DiskStore(root, NAMESPACE, capacity=1 << 50, min_free=0)
    _let_go(counted.scan())
    counted.close()
    store: Any = DiskStore(root, NAMESPACE, capacity=used, min_free=0)
    table.measure("write that surveys", lambda: store.write(key, blob_of(key)))
    table.measure("removal of a namespace", store.drop)
    store.close()


def handshake(table: Table, size: int, root: Path) -> None:
    """What a start found, on its way from the worker to the scheduler's index."""
    from kvtc_vllm.connector.messages import WorkerStart
    from kvtc_vllm.tiers import policies
    from kvtc_vllm.tiers.disk_index import DiskIndex
    from kvtc_vllm.tiers.inventory import Inventory
    from kvtc_vllm.tiers.keys import RecordKey

    capacity = 2 * size * CHUNK_BYTES
    index: Any = DiskIndex(capacity, 1, policies.REGISTRY["lru"](capacity))
    listed = ((RecordKey(key_of(number)), CHUNK_BYTES) for number in range(size))
    sent = WorkerStart(Inventory(listed))
    content = table.measure("handshake pickled", lambda: pickle.dumps(sent))
    found = table.measure("handshake unpickled", lambda: pickle.loads(content))
    table.measure("handshake into the index", lambda: index.restore({0: found.entries}))


def index(table: Table, size: int, root: Path) -> None:
    """The scheduler's indexes: growth record by record, and the reset."""
    from kvtc_vllm.tiers import policies
    from kvtc_vllm.tiers.disk_index import DiskIndex
    from kvtc_vllm.tiers.index import TierIndex

    capacity = 2 * size * CHUNK_BYTES
    for policy in ("lru", "arc"):
        memory: Any = TierIndex(capacity, 1, policies.REGISTRY[policy](capacity))
        disk: Any = DiskIndex(capacity, 1, policies.REGISTRY[policy](capacity))

        def store(number: int, memory: Any = memory) -> None:
            memory.reserve(key_of(number), CHUNK_BYTES)
            memory.commit(key_of(number), 0, CHUNK_BYTES)

        def add(number: int, disk: Any = disk) -> None:
            disk.add(key_of(number), 0, CHUNK_BYTES)

        for name, tier, call in (("memory", memory, store), ("disk", disk, add)):
            worst = max(_took(call, number) for number in range(size))
            table.note(f"{name} index, {policy}: store", worst)
            table.note(f"{name} index, {policy}: reset", _took(tier.clear))


def lost(table: Table, size: int, root: Path) -> None:
    """Others removed 60,000 chunks: what a step takes that is told, of a full index."""
    from kvtc_vllm.config import load_config
    from kvtc_vllm.offload import disk_news
    from kvtc_vllm.offload.disk_losses import DiskLosses
    from kvtc_vllm.offload.messages import WorkerReport
    from kvtc_vllm.offload.tier_indexes import tier_indexes
    from kvtc_vllm.tiers.keys import RecordKey

    keys = [RecordKey(key_of(number)) for number in range(size)]
    for policy in ("lru", "arc"):
        for name, most in (("in one step", LOST), ("in pieces", disk_news.TOLD_AT_ONCE)):
            settings = {"disk_path": str(root), "disk_bytes": 2 * size * CHUNK_BYTES}
            tiers = tier_indexes(load_config({"codec": "raw", "eviction": policy, **settings}), 1)
            assert tiers.disk is not None
            for key in keys:
                tiers.disk.add(key, 0, CHUNK_BYTES)
            gone = DiskLosses()
            gone.add(keys[:: size // LOST][:LOST])

            def step(tiers: TierIndexes = tiers, gone: DiskLosses = gone, most: int = most) -> None:
                news = disk_news.DiskNews()
                gone.tell(news, most)
                tiers.take(WorkerReport(0, disk_lost=news.lost))
                assert tiers.disk is not None
                tiers.disk.take_removed()

            worst = max(_took(step) for _ in range(-(-LOST // most)))
            assert len(tiers.disk) == size - LOST
            table.note(f"{LOST:,} lost, {policy}: {name}", worst)


def _took(call: Callable[..., None], *arguments: int) -> float:
    """Processor seconds of one call."""
    began = time.thread_time()
    call(*arguments)
    return time.thread_time() - began


def _let_go(items: list[Any]) -> None:
    """One by one, outside of what is measured."""
    while items:
        items.pop()


PARTS = {
    "plain": plain,
    "scan": scan,
    "write": write,
    "handshake": handshake,
    "index": index,
    "lost": lost,
}
ON_FILES = ("scan", "write")


def run(part: str, size: int, places: int, parent: str | None) -> Table:
    """One part in this process."""
    from kvtc_vllm.tiers.disk import DiskStore
    from tests.reliability.blobs import NAMESPACE

    table = Table(places)
    place = Path(tempfile.mkdtemp(prefix="kvtc-holds-", dir=parent))
    try:
        if part in ON_FILES:
            DiskStore(place / "tier", NAMESPACE, min_free=0).close()
            _make_files(place / "tier" / NAMESPACE.hex(), size)
        PARTS[part](table, size, place / "tier")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return table


def markdown(labels: dict[str, dict[str, Any]]) -> str:
    """Longest hold or call in ms: a line per row, a column per label."""
    names = dict.fromkeys(
        (part, name)
        for parts in labels.values()
        for part, table in parts.items()
        for name, row in table.items()
        if isinstance(row, dict)
    )
    lines = [f"| ms, at most | chunks | {' | '.join(labels)} |", "|---" * (len(labels) + 2) + "|"]
    for part, name in names:
        tables = [parts[part] for parts in labels.values() if name in parts.get(part, {})]
        cells = [_cell(parts.get(part, {}).get(name, {})) for parts in labels.values()]
        lines.append(f"| {name} | {tables[0]['chunks']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    return f"{_longest(row):.3g}" if row else ""


def _longest(row: Row) -> float:
    """Milliseconds of a hold or a call."""
    return float(row["longest, ms"] if "longest, ms" in row else row["longest call, ms"])


def measured(command: list[str]) -> dict[str, Row]:
    """The rows that a process of one part prints."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure and write, or measure one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="after")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--places", type=int, default=3)
    parser.add_argument(
        "--interval", type=float, default=sys.getswitchinterval(), help="Python's, in seconds"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--root", help="where to make a temporary directory")
    parser.add_argument("--out", type=Path, default=HERE / "holds.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        size = args.records if args.one == "index" else args.files
        sys.setswitchinterval(args.interval)
        print(json.dumps(run(args.one, size, args.places, args.root)))
        return
    labels = json.loads(args.out.read_text()) if args.out.exists() else {}
    label = labels.setdefault(args.label, {})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for part in args.parts.split(","):
        own = [sys.executable, "-m", "benchmarks.reliability.holds", "--one", part]
        given = [f"--files={args.files}", f"--records={args.records}", f"--places={args.places}"]
        given += [f"--interval={args.interval}", *([f"--root={args.root}"] if args.root else [])]
        rounds = [measured([*own, *given]) for _ in range(args.rounds)]
        label[part] = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit,
            "chunks": args.records if part == "index" else args.files,
            "CPUs": os.cpu_count(),
            "interval, ms": 1e3 * args.interval,
            "rounds": args.rounds,
            **{name: min((table[name] for table in rounds), key=_longest) for name in rounds[0]},
        }
        args.out.write_text(json.dumps(labels, indent=1) + "\n")
    print(markdown(labels), end="")


if __name__ == "__main__":
    main()
