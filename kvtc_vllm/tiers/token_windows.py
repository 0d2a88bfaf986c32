"""Finds chunks with the same tokens as a new one, at any shift. In the memory of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.sharded_dict import NumberDict, ShardedDict

TOKEN_BYTES = 4
"""Of a token id, as they are handed over."""
WINDOW = 32
"""Tokens that must be alike for a chunk to be found."""
_SAMPLED = 8
"""One of so many windows is kept: which, their contents decide, so that a shift changes nothing."""
LEAST_RUN = 16
"""Tokens that a run of like tokens must have for its chunk to be one of the sources."""
SHORT_WINDOW = 8
"""Tokens that must be alike for another run, once a chunk was found by a longer window."""
MOST_SOURCES = 2
"""A chunk of the same text lies over two of another grid."""


class Run(NamedTuple):
    """Where a chunk is alike to another: its own token, the other's number and token, how long."""

    token: int
    source: int
    source_token: int
    length: int


class Found(NamedTuple):
    """Chunks that a new one is alike to, and where."""

    sources: tuple[RecordKey, ...]
    runs: tuple[Run, ...]


class TokenWindows:
    """Chunks by some of the windows of their tokens. Not thread-safe.

    A window belongs to the last chunk that had it; windows of different tenants never meet. It
    takes about 2.5 KiB per chunk of 128 tokens, beside the tokens themselves.
    """

    def __init__(self) -> None:
        self._chunks: ShardedDict[tuple[bytes, bytes]] = ShardedDict()
        self._windows: NumberDict[tuple[RecordKey, int]] = NumberDict()
        self._edges: NumberDict[tuple[RecordKey, int]] = NumberDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, key: RecordKey, tenant: bytes, tokens: bytes) -> None:
        """Let later chunks be alike to this one. tokens: ids, `TOKEN_BYTES` each."""
        self.remove(key)
        self._chunks[key] = (tenant, tokens)
        for token, name in _windows(tenant, tokens):
            self._windows[name] = (key, token)
        for token, name in _edges(tenant, tokens):
            self._edges[name] = (key, token)

    def remove(self, key: RecordKey) -> None:
        """Forget a chunk; an unknown one is ignored."""
        if key not in self._chunks:
            return
        tenant, tokens = self._chunks.pop(key)
        for _, name in _windows(tenant, tokens):
            if self._windows.get(name, (b"",))[0] == key:
                del self._windows[name]
        for _, name in _edges(tenant, tokens):
            if self._edges.get(name, (b"",))[0] == key:
                del self._edges[name]

    def clear(self) -> None:
        """Forget all."""
        self._chunks.clear()
        self._windows.clear()
        self._edges.clear()

    def find(self, key: RecordKey, tenant: bytes, tokens: bytes) -> Found | None:
        """Those of the tenant's chunks in which most of these tokens occur, at most two.

        key: of the chunk itself, which is not among them. Runs go by their tokens and do not
        overlap. What edits moved inside a chunk is found by shorter windows, of which only those
        of the chunks found are compared; and so is a part too short for a window, with which one
        of their neighbours begins or ends.
        """
        shifts: dict[tuple[RecordKey, int], None] = {}
        for token, name in _windows(tenant, tokens):
            other = self._windows.get(name)
            if other is not None and other[0] != key:
                shifts.setdefault((other[0], other[1] - token))
        free = [True] * (len(tokens) // TOKEN_BYTES)
        sources: list[RecordKey] = []
        runs: list[Run] = []
        candidates = {place: self._runs(place, tenant, tokens, free) for place in shifts}
        while candidates and (len(sources) < MOST_SOURCES):
            place = max(candidates, key=lambda found: _length(candidates[found]))
            best = self._runs(place, tenant, tokens, free)
            del candidates[place]
            if not best:
                continue
            if place[0] not in sources:
                sources.append(place[0])
            number = sources.index(place[0])
            for token, theirs, length in best:
                runs.append(Run(token, number, theirs, length))
                free[token : token + length] = [False] * length
        for number, source in enumerate(sources):
            runs += self._short(tokens, number, source, free)
        if sources and len(sources) < MOST_SOURCES:
            neighbour = self._neighbour(key, tenant, tokens, free)
            if neighbour is not None:
                runs += self._short(tokens, len(sources), neighbour, free)
                sources.append(neighbour)
        return Found(tuple(sources), tuple(sorted(runs))) if runs else None

    def _short(self, tokens: bytes, number: int, source: RecordKey, free: list[bool]) -> list[Run]:
        found = _short_runs(tokens, self._chunks[source][1], free)
        return [Run(token, number, theirs, length) for token, theirs, length in found]

    def _neighbour(
        self, key: RecordKey, tenant: bytes, tokens: bytes, free: list[bool]
    ) -> RecordKey | None:
        """A chunk that begins or ends with free tokens, as those beside the chunks found do."""
        for at, gram in _short_windows(tokens):
            if not all(free[at : at + SHORT_WINDOW]):
                continue
            other = self._edges.get(hash((tenant, gram)))
            if other is None or other[0] == key:
                continue
            their_tenant, theirs = self._chunks[other[0]]
            begin = other[1] * TOKEN_BYTES
            if their_tenant == tenant and theirs[begin : begin + len(gram)] == gram:
                return other[0]
        return None

    def _runs(
        self, place: tuple[RecordKey, int], tenant: bytes, tokens: bytes, free: list[bool]
    ) -> list[tuple[int, int, int]]:
        """Runs (token, the other's token, length) of free tokens that the other has at a shift."""
        key, shift = place
        other_tenant, other = self._chunks[key]
        if other_tenant != tenant:  # two windows of one hash
            return []
        own = memoryview(tokens).cast("i")
        theirs = memoryview(other).cast("i")
        runs: list[tuple[int, int, int]] = []
        first = max(0, -shift)
        begun = first
        for token in range(first, min(len(own), len(theirs) - shift) + 1):
            inside = token < min(len(own), len(theirs) - shift)
            if inside and free[token] and own[token] == theirs[token + shift]:
                continue
            if token - begun >= LEAST_RUN:
                runs.append((begun, begun + shift, token - begun))
            begun = token + 1
        return runs


def _short_runs(tokens: bytes, theirs: bytes, free: list[bool]) -> Iterator[tuple[int, int, int]]:
    """Runs (token, the other's token, length) of free tokens, at any shift; takes them."""
    size = SHORT_WINDOW * TOKEN_BYTES
    own, other = memoryview(tokens).cast("i"), memoryview(theirs).cast("i")
    places: dict[bytes, int] | None = None
    token = 0
    while token + SHORT_WINDOW <= len(own):
        if not all(free[token : token + SHORT_WINDOW]):
            token += 1
            continue
        if places is None:  # where all tokens have a source already, none are looked for
            places = {gram: at for at, gram in _short_windows(theirs)}
        at = token * TOKEN_BYTES
        place = places.get(tokens[at : at + size])
        if place is None:
            token += 1
            continue
        length = SHORT_WINDOW
        while (
            token + length < len(own)
            and place + length < len(other)
            and free[token + length]
            and own[token + length] == other[place + length]
        ):
            length += 1
        free[token : token + length] = [False] * length
        yield token, place, length
        token += length


def _short_windows(tokens: bytes) -> Iterator[tuple[int, bytes]]:
    """(first token, tokens) of all short windows."""
    size = SHORT_WINDOW * TOKEN_BYTES
    for at in range(0, len(tokens) - size + 1, TOKEN_BYTES):
        yield at // TOKEN_BYTES, tokens[at : at + size]


def _edges(tenant: bytes, tokens: bytes) -> Iterator[tuple[int, int]]:
    """(first token, hash) of the short windows with which a chunk begins and ends."""
    size = SHORT_WINDOW * TOKEN_BYTES
    for at in {0, len(tokens) - size} if len(tokens) >= size else ():
        yield at // TOKEN_BYTES, hash((tenant, tokens[at : at + size]))


def _windows(tenant: bytes, tokens: bytes) -> Iterator[tuple[int, int]]:
    """(first token, hash) of the windows that are kept."""
    for token in range(len(tokens) // TOKEN_BYTES - WINDOW + 1):
        at = token * TOKEN_BYTES
        name = hash(tokens[at : at + WINDOW * TOKEN_BYTES])
        if not name % _SAMPLED:
            yield token, hash((tenant, name))


def _length(runs: list[tuple[int, int, int]]) -> int:
    return sum(length for _, _, length in runs)
