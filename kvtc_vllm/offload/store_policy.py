"""What is stored, and when: policies that compose.

The scheduler cuts a request's tokens into chunks and knows how to store one; whether a chunk is
worth it, and in which step, is decided here and nowhere else. A policy is asked about chunks in
the step that completes them, and in every step whether any that it has kept back are due now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from kvtc_vllm.offload.keys import STORE, allowed
from kvtc_vllm.offload.messages import AdapterUse
from kvtc_vllm.offload.seen_counter import SeenCounter
from kvtc_vllm.offload.vllm_types import BlockPool, Request
from kvtc_vllm.tiers.keys import ChunkKey, RecordKey


class Storable(Protocol):
    """What a store needs to know of a chunk."""

    @property
    def key(self) -> ChunkKey: ...

    @property
    def start(self) -> int:
        """Token position of its first token."""
        ...

    @property
    def block_ids(self) -> tuple[list[int], ...]:
        """Its blocks by cache group."""
        ...

    @property
    def adapter(self) -> AdapterUse:
        """What the key assumes."""
        ...

    @property
    def tenant(self) -> bytes:
        """Whose it is."""
        ...

    @property
    def tokens(self) -> bytes:
        """As of `StoreItem`."""
        ...


class Candidate(NamedTuple):
    """A chunk that a request's step completes, or that it began with."""

    key: ChunkKey
    request: Request
    """vLLM's request that computes it."""
    start: int
    """Token position of its first token."""
    end: int
    """Token position after its last token."""
    block_ids: tuple[list[int], ...]
    """Its blocks by cache group; none where its record is not to be stored."""
    adapter: AdapterUse
    """What the key assumes."""
    tenant: bytes = b""
    """Whose it is."""
    stored: bool = False
    """Memory has it, or is about to."""
    tokens: bytes = b""
    """As of `StoreItem`."""


class StorePolicy(Protocol):
    """Used by the scheduler's thread only."""

    @property
    def watches(self) -> bool:
        """Whether it wants to hear of chunks that are stored already."""
        ...

    def bind(self, pool: BlockPool) -> None:
        """Take vLLM's pool of blocks. Called once, before the first step."""
        ...

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those of a request's chunks to be stored after this step, which completes them.

        Those that are stored already may be among them, and are not stored again.
        """
        ...

    def due(self) -> Sequence[Storable]:
        """Chunks of earlier steps to be staged before this step's forward. Once per step.

        Their blocks must still hold them: it is for the policy to know.
        """
        ...

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        """Note that these chunks of a request come out of the tier."""
        ...

    def take_kept(self) -> Sequence[Storable]:
        """Chunks that were kept back since the last call."""
        ...

    def take_gone(self) -> Sequence[RecordKey]:
        """Records whose blocks hold them no longer than until this step. After `due`."""
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended; its chunks may be due later."""
        ...

    def clear(self) -> None:
        """Drop all chunks that are kept back: their names were given up."""
        ...


class Eager:
    """Stores every chunk as soon as it is complete."""

    watches = False

    def bind(self, pool: BlockPool) -> None:
        pass

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        return chunks

    def due(self) -> Sequence[Storable]:
        return ()

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        pass

    def take_kept(self) -> Sequence[Storable]:
        return ()

    def take_gone(self) -> Sequence[RecordKey]:
        return ()

    def forget(self, request_id: str) -> None:
        pass

    def clear(self) -> None:
        pass


class Nothing(Eager):
    """Stores nothing: the engine only loads."""

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        return ()


class Around:
    """Hands everything on to another policy."""

    def __init__(self, inner: StorePolicy) -> None:
        self._inner = inner

    @property
    def watches(self) -> bool:
        return self._inner.watches

    def bind(self, pool: BlockPool) -> None:
        self._inner.bind(pool)

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        return self._inner.completed(chunks)

    def due(self) -> Sequence[Storable]:
        return self._inner.due()

    def loaded(self, request_id: str, chunks: Iterable[ChunkKey]) -> None:
        self._inner.loaded(request_id, chunks)

    def take_kept(self) -> Sequence[Storable]:
        return self._inner.take_kept()

    def take_gone(self) -> Sequence[RecordKey]:
        return self._inner.take_gone()

    def forget(self, request_id: str) -> None:
        self._inner.forget(request_id)

    def clear(self) -> None:
        self._inner.clear()


class _Filter(Around):
    """Asks another policy about some of the chunks only."""

    def takes(self, chunk: Candidate) -> bool:
        """Whether the other policy hears of this chunk."""
        raise NotImplementedError

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        return self._inner.completed([chunk for chunk in chunks if self.takes(chunk)])


class OptOut(_Filter):
    """Leaves out requests that say so in their `kv_transfer_params`."""

    def completed(self, chunks: Sequence[Candidate]) -> Sequence[Candidate]:
        if chunks and not allowed(chunks[0].request, STORE):
            return ()
        return self._inner.completed(chunks)


class PromptOnly(_Filter):
    """Leaves out chunks with generated tokens."""

    def takes(self, chunk: Candidate) -> bool:
        return bool(chunk.end <= chunk.request.num_prompt_tokens)


class SeenOften(_Filter):
    """Leaves out chunks that fewer than `threshold` requests have contained.

    refused: called for every chunk that is left out.
    """

    def __init__(
        self, inner: StorePolicy, threshold: int, refused: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(inner)
        self._seen = SeenCounter(threshold)
        self._refused = refused
        self._counted: dict[str, set[ChunkKey]] = {}

    def takes(self, chunk: Candidate) -> bool:
        if chunk.stored:
            return True
        counted = self._counted.setdefault(chunk.request.request_id, set())
        if chunk.key in counted:
            return False  # a request that is preempted counts once
        if self._seen.admits(chunk.key):
            return True
        counted.add(chunk.key)
        self._refused()
        return False

    def forget(self, request_id: str) -> None:
        self._counted.pop(request_id, None)
        super().forget(request_id)


def make_store_policy(
    *,
    stores: bool,
    prompt_only: bool,
    threshold: int,
    refused: Callable[[], None],
    timing: StorePolicy | None = None,
) -> StorePolicy:
    """The policy that a configuration asks for.

    stores: whether the engine's role allows it at all. threshold: requests with a chunk before it
    may be stored. timing: when what may be stored is; at once if not given.
    """
    if not stores:
        return Nothing()
    policy: StorePolicy = timing if timing is not None else Eager()
    if threshold > 1:
        policy = SeenOften(policy, threshold, refused)
    if prompt_only:
        policy = PromptOnly(policy)
    return OptOut(policy)
