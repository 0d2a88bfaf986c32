"""The name under which a worker's KV is kept, and the watch that it stays true.

A name is the 16-byte identity of the set-up, of the live weights and of the generation: chunks
of one name were computed by exactly one thing. It is made when the worker starts and again after
every reset or change of weights; between, samples of the weights are compared with those of the
name, so that nothing is stored or loaded under a name that is not true any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash

from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.offload.adapters import LoadedAdapters
from kvtc_vllm.offload.namespace import Namespace
from kvtc_vllm.offload.setup_identity import SetupIdentity
from kvtc_vllm.offload.weights import Unwatched, WeightsWatch
from kvtc_vllm.offload.word_sample import Sample
from kvtc_vllm.tiers.disk import DiskStore

OpenStore = Callable[[bytes, bytes], DiskStore]
"""(identity, generation) -> the store of that namespace. Raises DiskError."""

Gather = Callable[[Any], Sequence[Any]]
"""What every rank gives, in the order of ranks. All ranks call it, at the same point."""

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Proof:
    """That in a step what the names of its epoch stand for computes. May be asked on any thread."""

    step: int
    epoch: int
    samples: tuple[Sample, ...]

    @property
    def holds(self) -> bool:
        """On a GPU waits for the samples."""
        return all(sample.matches() for sample in self.samples)


class Names:
    """Names of one worker. Used by the engine's thread only.

    codecs: they write and read blobs of the present name. setup: None where nothing tells set-ups
    apart, in tests. open_store: None without a disk tier. may_sleep: the weights' memory may be
    taken away while no step computes, and must not be read then. gather: of an engine with several
    ranks, each of which computes with what the others give it. So its name is of what computes on
    all of them, and ranks meet to make one. one_name: for all of them, since one copy is kept for
    all; they meet for every name then. Else each has its own, and they meet for those without a
    generation, which outlive the engine. engines: among engines with whose weights it computes as
    well; they meet at the start only. changes: times that other weights were found than those of
    the name before.
    """

    def __init__(
        self,
        codecs: Sequence[ChunkCodec],
        setup: SetupIdentity | None = None,
        weights: WeightsWatch | Unwatched | None = None,
        adapters: LoadedAdapters | None = None,
        open_store: OpenStore | None = None,
        may_sleep: bool = False,
        gather: Gather | None = None,
        one_name: bool = False,
        engines: Gather | None = None,
    ) -> None:
        self._codecs = codecs
        self._gather = gather
        self._one_name = one_name
        self._engines = engines
        self._identity = b""
        self._setup = setup
        self._weights = weights if weights is not None else Unwatched()
        self.adapters = adapters if adapters is not None else LoadedAdapters(None)
        self._open_store = open_store
        self.may_sleep = may_sleep
        self._digest: bytes | None = None
        self.changes = 0

    def rename(self, generation: bytes) -> bool:
        """Make the name of what computes now; False if the weights are those of the last name.

        Where ranks meet all must do so in the same step, and wait for each other. Blobs that are
        being made under the last one meanwhile belong to an older epoch and are dropped.
        """
        digest = self._weights.digest()
        self.adapters.forget()
        if self._setup is not None:
            self._identity = self._setup.digest(digest, generation)
        else:
            self._identity = xxhash.xxh3_128_digest(digest + generation)
        if self._gather is not None and (self._one_name or not generation):
            weights, all_ranks = _joined(self._gather(_padded(digest) + self._identity))
            if self._one_name:
                digest, self._identity = weights, all_ranks
            else:
                self._identity = xxhash.xxh3_128_digest(self._identity + all_ranks)
        if self._engines is not None and not generation:
            of_all = b"".join(self._engines(self._identity))
            self._identity = xxhash.xxh3_128_digest(self._identity + of_all)
        changed = self._digest is not None and digest != self._digest
        self._digest = digest
        self.changes += changed
        for codec in self._codecs:
            codec.identity = self._identity
        return changed

    def namespace(self, generation: bytes) -> Namespace | None:
        """Where chunks of the present name lie on disk; not opened yet."""
        if self._open_store is None:
            return None
        return Namespace(
            partial(self._open_store, self._identity, generation), own=bool(generation)
        )

    def prove(
        self, step: int, epoch: int, adapters: Iterable[int] = (), dense: bool = False
    ) -> Proof:
        """Sample the weights now, and the adapters with these numbers."""
        of_adapters = (self.adapters.sample(number) for number in sorted(set(adapters)))
        return Proof(step, epoch, (self._weights.sample(dense), *of_adapters))

    def release(self) -> None:
        """Let go of the model: nothing computes any more."""
        self._weights, self.adapters = Unwatched(), LoadedAdapters(None)


def _padded(digest: bytes) -> bytes:
    """Unwatched weights have none."""
    return digest.ljust(_DIGEST_BYTES, b"\0")


def _joined(parts: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Digests over the weights and over the identities of all ranks."""
    weights = b"".join(part[:_DIGEST_BYTES] for part in parts)
    identities = b"".join(part[_DIGEST_BYTES:] for part in parts)
    return xxhash.xxh3_128_digest(weights), xxhash.xxh3_128_digest(identities)
