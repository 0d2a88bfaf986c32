"""Keeps equal bodies of blobs once, within one tenant."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable

from kvtc_vllm.tiers.blob_store import Blob, MemoryStore, StoreError
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import ShardedDict

_NAME_BYTES = 16
"""Of a body; names of records are longer."""


def body_name(owner: bytes, body: bytes) -> bytes:
    """Hash by which equal bodies of one owner are found, 16 bytes."""
    lead = len(owner).to_bytes(4, "little") + owner
    return hashlib.blake2b(lead + body, digest_size=_NAME_BYTES).digest()


class OnceStore:
    """A `MemoryStore` around another. Safe for the worker's step, encode and load threads.

    A blob begins with `head` and ends with `tail` bytes of its own; what lies between is its
    body. Bodies are found by a hash and compared byte by byte before they are shared. The oldest
    blob with a body is charged for it; when that one goes, the next is.
    """

    def __init__(self, inner: MemoryStore, head: int, tail: int) -> None:
        self._inner = inner
        self._head, self._tail = head, tail
        self._bodies: ShardedDict[RecordKey] = ShardedDict()
        self._users: ShardedDict[dict[RecordKey, None]] = ShardedDict()
        self._tenants: ShardedDict[bytes] = ShardedDict()
        self._resized: dict[RecordKey, int] = {}
        self._lock = threading.Lock()

    def write(self, key: RecordKey, blob: Blob, tenant: bytes = b"") -> int:
        """Keep a blob; returns what it adds. Raises StoreError "full", and keeps nothing."""
        # Parts of their own: a view would keep all of the blob.
        body = bytes(blob[self._head : len(blob) - self._tail])
        own = bytes(blob[: self._head]) + bytes(blob[len(blob) - self._tail :])
        name = RecordKey(body_name(tenant or key, body))  # nobody's is shared with nobody
        with self._lock:
            self._remove(key)
            if name in self._users and self._inner.read(name) != body:
                name = RecordKey(body_name(key, b""))  # another body of the same hash: kept apart
            size = self._inner.write(key, own)
            if name not in self._users:
                try:
                    size += self._inner.write(name, body)
                except StoreError:
                    self._inner.remove([key])
                    raise
            self._bodies[key] = name
            self._tenants[key] = tenant
            self._users.setdefault(name, {})[key] = None
            return size

    def read(self, key: RecordKey) -> bytes:
        """The blob. Raises StoreError "missing"."""
        with self._lock:
            if key not in self._bodies:
                raise StoreError("missing", "the record is not in memory")
            own, body = self._inner.read(key), self._inner.read(self._bodies[key])
        return b"".join((own[: self._head], body, own[self._head :]))

    def remove(self, keys: Iterable[RecordKey]) -> int:
        """Forget blobs and return how many there were; unknown names are ignored."""
        with self._lock:
            return sum(self._remove(key) for key in list(keys))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for found in (self._bodies, self._users, self._tenants):
                found.clear()
            self._resized.clear()
            self._inner.clear()

    def keys(self) -> list[RecordKey]:
        """Names of all blobs, oldest first."""
        with self._lock:
            kept = self._inner.keys()
            return [key for key in kept if key in self._bodies]

    def tenant_of(self, key: RecordKey) -> bytes:
        """Whose a blob is, as `write` was told; nobody's if there is none."""
        with self._lock:
            tenant: bytes = self._tenants.get(key, b"")
            return tenant

    def take_resized(self) -> list[tuple[RecordKey, int]]:
        """Blobs that are charged for a body now and were not, with all that they take."""
        with self._lock:
            resized, self._resized = self._resized, {}
        return list(resized.items())

    def _remove(self, key: RecordKey) -> bool:
        name = self._bodies.pop(key, None)
        if name is None:
            return False
        self._inner.remove([key])
        self._tenants.pop(key, None)
        self._resized.pop(key, None)
        users = self._users[name]
        charged = next(iter(users)) == key
        del users[key]
        if not users:
            del self._users[name]
            self._inner.remove([name])
        elif charged:
            heir = next(iter(users))
            self._resized[heir] = self._head + self._tail + len(self._inner.read(name))
        return True
