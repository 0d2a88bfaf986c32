"""The disk tier: one plain file per chunk and rank. Imports neither torch nor vLLM.

Cache semantics: nothing is fsynced; a lost chunk is a miss, and torn or altered data is
caught by the checksum that every blob ends in and is a miss too.

Layout of a tier's root directory (`layout.py`)::

    layout.json                        layout version; an unknown one is refused, untouched
    ledger.json                        bytes and hits per namespace; its flock is the root's lock
    set-aside-<random>                 what was in the way; never looked at again (`places.py`)
    <namespace, 32 hex>/namespace.json for people: model, artifact, ratio, rank (`record.py`)
    <namespace>/in-use           whoever has it open holds a shared flock on it (`in_use.py`)
    <namespace>/removals         keys of chunks that were removed (`removal_log.py`)
    <namespace>/files            what is known of the files, for the next scan (`file_list.py`)
    <namespace>/files.new        the same, being written
    <namespace>/<first key byte>/<key, hex>.kvtc
    <namespace>/<first key byte>/<key, hex>.<key, hex>.body  a link to the first one's file, through
                                 which the second is read (`reference.py`)
    <namespace>/tmp/<pid>-<random>.tmp
    Whatever is named differently is never touched.

A namespace is the 16-byte identity fingerprint of one model set-up *and* rank. A blob is
handed out only if its checksum holds and its header says that it was written for this
namespace and key (`layout.check_blob`), so a file in a wrong place is a miss. Whether it is the
chunk that a request needs (position, geometry) is for the caller's decoder to check.

Generations: an identity may hold a random nonce (`NamespaceRecord.generation`). An engine whose
cache is reset goes on in such a namespace and leaves the one before alone, because other
engines may use it. Once its engine has ended nobody can name it again: the engine itself
(`DiskStore.drop`) or `kvtc gc --ended` removes it; until then it ages and is evicted like any
other. To tell that an engine has ended, a store marks its namespace as in use while it is open.
A store that cannot mark works all the same; `--ended` may then remove what it has: misses.

Equal bodies: a write that names a tenant may become a reference to a chunk of the same tenant with
the same body, which this store has written (`bodies.py`, `reference.py`). Readers still need no
lock: a link is made before the reference is published and goes after it.

Publication: under the lock, make room, enter the bytes in the ledger, create a uniquely named
temporary of the final size and flock it; without the lock, write it, read it back, compare;
under the lock, rename it. Published files are never changed or replaced: if a key is already
there, the newcomer is dropped. A reader therefore needs no lock and no pin: an unlinked
file stays readable for who has it open.

Nothing in the root is trusted. Calls go from directory descriptor to descriptor, follow no symbolic
link and refuse a directory that others own or may write (`filesystem.py`). What is no plain file
is never waited for or read. Bookkeeping carries checksums; what is damaged is counted anew or made
anew, and told as a repair. A file above `most_bytes` is no chunk and is removed.

Cap and eviction: the store enforces the cap, over the whole root. Processes that share a root
know nothing of each other's indexes, so only something that all of them see can hold the
cap: the ledger, and modification times as recency. Room is made by removing the least recently
used chunks of any namespace; those of the own one are handed to the caller (`take_evicted`).
A caller alone on its root that keeps its own index under the same capacity and calls
`remove` for its victims never reaches this second line, so its policy (LRU, ARC) decides.
Sizes are counted in whole 4 KiB blocks, which is what they take; directories, the ledger, the
records (a few MiB) and the list of files (0.3 % of chunks of 20 KB) are not counted. The minimum of
free space is kept in the same way, so the tier shrinks when something else fills the disk.
The ledger is never below the truth: bytes are entered before they are
written and taken off after they are unlinked. A process that dies leaves it too high; every
`scan`, and the survey of the root whenever an evictor has run out of candidates, corrects it. Both
give the root's lock back every few thousand files. The ledger says how far they are, and whoever
changes what they have passed corrects their sum, so that it is exact in the end.

Other processes may, at any moment: add chunks (they count against the cap), remove any
(the next `take_removed` tells, or the next read says "missing"), die (the kernel frees their
locks; a temporary whose lock can be taken is an orphan and the next `scan` removes it), or delete
the whole directory (it is made anew by the next write, with record and mark). All must give the
same capacity; the smallest wins.

Failures: every one is a `DiskError` with a reason, counted by operation and reason, and means
"miss" for a read and "not stored" for a write::

    ENOENT                             missing (directories are recreated once)
    ENOSPC EDQUOT EFBIG                no_space
    EIO ESTALE ENXIO ENODEV ETIMEDOUT  io
    EMFILE ENFILE ENOMEM               too_many_files
    EROFS                              read_only
    EACCES EPERM                       permission
    ENOLCK ENOSYS EOPNOTSUPP           unsupported (a file system without flock)
    EINTR, short reads and writes      repeated; interrupted if it never ends
    EEXIST EISDIR ELOOP, no plain file foreign    in a chunk's place: removed if it can be
    anything else                      other
    bad checksum, wrong length         corrupt    the file is removed
    other namespace or key             foreign    the file is removed
    what it refers to is lost or bad   representative    the reference is removed
    cap or free space cannot be held   full       lock not had in time  busy
    unknown layout version             layout     key not 1..100 bytes  key
    store or pool closed, or forked    closed
    pool: deadline, queue_full, stalled

Threads: a `DiskStore` is synchronous and may be used from any number of threads. Reads and
touches take no lock; writes, removals and scans share one, and wait for it at most
10 s. A file system call may hang for ever, so a caller with a deadline goes through an
`IoPool`: its threads are daemons, waiting for them ends at the deadline, and once all
of them hang it refuses work at once. Give reads and writes a pool each: a write may wait for
the lock. So may touches and `take_removed`, if they are made behind writes. (A thread that the
kernel will not interrupt, as on a dead hard NFS mount, may delay the end of a killed process;
nothing in user space can prevent that.)
"""

from kvtc_vllm.tiers.disk.checked import DISK_REASONS, DiskError
from kvtc_vllm.tiers.disk.filesystem import FileSystem, OsFileSystem
from kvtc_vllm.tiers.disk.iopool import IoHandle, IoPool
from kvtc_vllm.tiers.disk.layout import disk_bytes
from kvtc_vllm.tiers.disk.record import NamespaceRecord
from kvtc_vllm.tiers.disk.store import DiskEntry, DiskStore

__all__ = [
    "DISK_REASONS",
    "DiskEntry",
    "DiskError",
    "DiskStore",
    "FileSystem",
    "IoHandle",
    "IoPool",
    "NamespaceRecord",
    "OsFileSystem",
    "disk_bytes",
]
