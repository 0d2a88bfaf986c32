"""Writers on a root whose bookkeeping is damaged and whose places are taken, while they run.

    python -m tests.reliability.hostile --cycles 100 [--shared]

Every cycle forks writers on one root with a small cap and two namespaces; meanwhile damages
bookkeeping files (flips, cuts, garbage, nesting, enlargement), puts pipes, sockets, links,
directories and sparse files in places of the tier and changes modes; kills the writers; and
checks what a restarted engine finds: it starts, every chunk reads as what was written or is a
declared miss, the ledger equals what is on disk and is within the cap after a write, and nothing
outside the root has changed. A writer ends by itself only if it saw a wrong blob or an exception
that is not declared; it must end at the kill, not hang before it. `--shared`: of
chunks with few bodies among them, whose links are attacked too.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

from kvtc_vllm.tiers.disk import DiskError, DiskStore, NamespaceRecord
from tests.reliability import disk
from tests.reliability.blobs import NAMESPACE, OTHER_NAMESPACE, blob_of, key_of, twin_of
from tests.reliability.kill9 import Unsound, expect_killed, fork

PAGE = 4096
CAPACITY = 64 * PAGE
KEYS = 60
LONGEST = 20_000
MOST_BYTES = LONGEST + 1000
RUN_SECONDS = 0.03
DAMAGES = 6
"""At most, per cycle."""
NAMESPACES = (NAMESPACE, OTHER_NAMESPACE)
RECORD = NamespaceRecord(
    model="m", codec="raw", dtype="bfloat16", rank=0, tp_size=1, most_bytes=MOST_BYTES
)


Blobs = Callable[[bytes, bytes, int], bytes]
TENANTS: dict[Blobs, bytes] = {blob_of: b"", twin_of: b"one"}


def open_store(root: Path, namespace: bytes) -> DiskStore:
    return DiskStore(
        root,
        namespace,
        capacity=CAPACITY,
        min_free=0,
        most_bytes=MOST_BYTES,
        namespace_record=RECORD,
    )


def write_forever(root: Path, namespace: bytes, seed: int, blobs: Blobs) -> None:
    """The victim. Status 3: a wrong blob, or one that is never ours. Others: not declared."""
    generator = random.Random(seed)
    while True:
        with suppress(DiskError):
            store = open_store(root, namespace)
            store.scan()
            work(store, namespace, generator, blobs)


def work(store: DiskStore, namespace: bytes, generator: random.Random, blobs: Blobs) -> None:
    while True:
        key = key_of(generator.randrange(KEYS))
        action = generator.random()
        with suppress(DiskError):
            if action < 0.5:
                store.write(key, blobs(key, namespace, LONGEST), TENANTS[blobs])
            elif action < 0.75:
                if store.read(key) != blobs(key, namespace, LONGEST):
                    os._exit(3)
            elif action < 0.85:
                store.remove([key])
            elif action < 0.95:
                store.touch([key])
                store.take_removed()
            elif action < 0.99:
                store.scan()
            else:
                store.close()
                return


class Attacker:
    """Random damage to a tier, repeatable by its seed. outside: what must not change."""

    def __init__(self, root: Path, outside: Path, seed: int) -> None:
        self._root = root
        self._outside = outside
        self._chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._damages: tuple[Callable[[Path], None], ...] = (
            self.flip,
            self.flip,
            self.cut,
            self.garbage,
            self.nest,
            self.enlarge,
            self.sparse,
            self.remove,
            self.pipe,
            self.socket,
            self.link_out,
            self.link_directory_out,
            self.hard_link_out,
            self.directory,
            self.open_to_others,
        )
        self._in_place = (
            self.flip,
            self.cut,
            self.garbage,
            self.nest,
            self.enlarge,
            self.sparse,
        )

    def strike(self) -> None:
        """One damage in one place, if the place is there."""
        damage = self._chance.choice(self._damages)
        path = self.place()
        with suppress(OSError):
            if self._is_inside(path, damage in self._in_place):
                damage(path)
                self.done[damage.__name__] += 1

    def _is_inside(self, path: Path, in_place: bool) -> bool:
        """Whether the damage would be done here, and not through links of before elsewhere.

        Nor in a pipe of before, which would wait for its other end.
        """
        if path.parent.resolve() != path.parent:
            return False
        if not in_place or not os.path.lexists(path):
            return True
        return not path.is_symlink() and path.is_file() and path.stat().st_nlink == 1

    def place(self) -> Path:
        namespace = self._root / self._chance.choice(NAMESPACES).hex()
        key = key_of(self._chance.randrange(KEYS)).hex()
        chunk = namespace / key[:2] / f"{key}.kvtc"
        return self._chance.choice(
            [
                self._root / "ledger.json",
                self._root / "ledger.json",
                self._root / "layout.json",
                namespace / "namespace.json",
                namespace / "in-use",
                namespace / "removals",
                namespace / "tmp",
                namespace / "tmp" / "1-0123456789abcdef.tmp",
                namespace,
                chunk.parent,
                chunk,
                chunk,
                *self._chance.choices(disk.links(self._root) or [chunk], k=2),
            ]
        )

    def flip(self, path: Path) -> None:
        with path.open("r+b") as file:
            content = bytearray(file.read(8192))
            end = len(content.rstrip(b" "))
            if end:
                content[self._chance.randrange(end)] ^= 1 << self._chance.randrange(8)
            file.seek(0)
            file.write(content)

    def cut(self, path: Path) -> None:
        if path.is_file():
            os.truncate(path, self._chance.randrange(max(1, path.stat().st_size)))

    def garbage(self, path: Path) -> None:
        if not path.is_dir():
            path.write_bytes(self._chance.randbytes(self._chance.randrange(300)))

    def nest(self, path: Path) -> None:
        if path.suffix == ".json":
            path.write_bytes(self._chance.choice((b"[", b'{"a":')) * 20_000)

    def enlarge(self, path: Path) -> None:
        if path.suffix == ".json":
            os.truncate(path, self._chance.choice((1 << 17, 1 << 25)))

    def sparse(self, path: Path) -> None:
        if path.is_file():
            os.truncate(path, self._chance.choice((MOST_BYTES - 1000, 1 << 31)))

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()

    def pipe(self, path: Path) -> None:
        self.remove_first(path)
        os.mkfifo(path)

    def socket(self, path: Path) -> None:
        self.remove_first(path)
        with socket.socket(socket.AF_UNIX) as server:
            short = self._root.parent / "socket"  # a longer one has no room in an address
            server.bind(str(short))
        short.rename(path)

    def link_out(self, path: Path) -> None:
        self.remove_first(path)
        path.symlink_to(self._chance.choice(sorted(self._outside.iterdir())))

    def link_directory_out(self, path: Path) -> None:
        self.remove_first(path)
        path.symlink_to(self._outside)

    def hard_link_out(self, path: Path) -> None:
        self.remove_first(path)
        path.hardlink_to(self._outside / "important.tmp")

    def directory(self, path: Path) -> None:
        self.remove_first(path)
        path.mkdir(mode=0o700)
        if self._chance.random() < 0.5:
            (path / "somebody's").write_bytes(b"kept")

    def open_to_others(self, path: Path) -> None:
        os.chmod(self._chance.choice((path.parent, self._root)), 0o777)

    def remove_first(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            self.remove(path)


def make_outside(place: Path) -> dict[str, bytes]:
    place.mkdir()
    for name in ("important.tmp", "1-0123456789abcdef.tmp", f"{key_of(0).hex()}.kvtc"):
        (place / name).write_bytes(b"important")
    return contents(place)


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def close_to_others(root: Path) -> None:
    """Undo `open_to_others`, as an operator would who was told so at the start."""
    os.chmod(root, 0o700)
    for path in root.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            os.chmod(path, 0o700)


def check_restart(root: Path, blobs: Blobs) -> int:
    """What a restarted engine does. Returns the chunks that read well. Raises Unsound."""
    sound = 0
    descriptors = disk.open_descriptors()
    stores = [open_store(root, namespace) for namespace in NAMESPACES]
    for store in stores:
        listed = store.scan()
        for entry in listed:
            try:
                if store.read(entry.key) != blobs(entry.key, store.namespace, LONGEST):
                    raise Unsound(f"wrong blob under {entry.key.hex()}")
                sound += 1
            except DiskError as error:
                if error.reason not in ("corrupt", "foreign", "representative"):
                    raise Unsound(f"{entry.key.hex()}: {error}") from error
        key = key_of(KEYS)
        store.write(key, blob_of(key, store.namespace, LONGEST))
        if store.read(key) != blob_of(key, store.namespace, LONGEST):
            raise Unsound("what was just written reads otherwise")
        store.remove([key])
    if disk.ledger_bytes(root) < disk.bytes_on_disk(root):
        raise Unsound("the ledger is below the truth")
    if TENANTS[blobs]:  # a link to a file outside counts until it is found to be nobody's
        for store in stores:
            store.scan()
    on_disk = disk.bytes_on_disk(root)
    if not disk.ledger_bytes(root) == on_disk <= CAPACITY:
        raise Unsound(f"ledger {disk.ledger_bytes(root)}, {on_disk} on disk, cap {CAPACITY}")
    for store in stores:
        store.close()
    if disk.open_descriptors() != descriptors:
        raise Unsound("descriptors are left open")
    return sound


def run(
    place: Path, cycles: int, writers: int, seed: int, blobs: Blobs = blob_of
) -> dict[str, object]:
    """Raises Unsound at the first broken promise."""
    place.mkdir(exist_ok=True)
    root, outside = place / "tier", place / "outside"
    before = make_outside(outside)
    for namespace in NAMESPACES:
        open_store(root, namespace).close()
    chance = random.Random(seed)
    attacker = Attacker(root, outside, seed)
    began = time.monotonic()
    sound = references = 0
    for cycle in range(cycles):
        victims = [
            fork(
                write_forever, root, NAMESPACES[number % 2], seed + cycle * writers + number, blobs
            )
            for number in range(writers)
        ]
        try:
            for _ in range(chance.randrange(1, DAMAGES + 1)):
                time.sleep(chance.uniform(0.0, RUN_SECONDS / 3))
                attacker.strike()
            time.sleep(chance.uniform(0.0, RUN_SECONDS))
        finally:
            for victim in victims:
                os.kill(victim, SIGKILL)
        for victim in victims:
            expect_killed(victim)
        close_to_others(root)
        sound += check_restart(root, blobs)
        references += len(disk.links(root))
        if contents(outside) != before:
            raise Unsound(f"cycle {cycle}: something outside was changed")
    return {
        "cycles": cycles,
        "killed": cycles * writers,
        "damaged": attacker.done.total(),
        "damages": dict(sorted(attacker.done.items())),
        "chunks_checked": sound,
        "references_among_them": references,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="chunks with few bodies among them")
    args = parser.parse_args()
    logging.getLogger("vllm.kvtc").setLevel(logging.CRITICAL)  # thousands of repairs
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        blobs = twin_of if args.shared else blob_of
        print(run(Path(place) / "place", args.cycles, args.writers, args.seed, blobs))


if __name__ == "__main__":
    sys.exit(main())
