"""Finds chunks with the same tokens as a new one, at any shift. In the memory of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvtc_vllm.tiers.keys import RecordKey

TOKEN_BYTES = 4
"""Of a token id, as they are handed over."""
WINDOW = 32
"""Tokens that must be alike for a chunk to be found."""
_SAMPLED = 8
"""One of so many windows is kept: which, their contents decide, so that a shift changes nothing."""
LEAST_RUN = 16
"""Tokens that a run of like tokens must have for its chunk to be one of the sources."""
SHORT_WINDOW = 8
"""Tokens that must be alike for another run within a chunk that was found by a longer one."""
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
    takes about two KiB per chunk of 128 tokens, beside the tokens themselves.
    """

    def __init__(self) -> None:
        self._chunks: dict[RecordKey, tuple[bytes, bytes]] = {}
        self._windows: dict[int, tuple[RecordKey, int]] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, key: RecordKey, tenant: bytes, tokens: bytes) -> None:
        """Let later chunks be alike to this one. tokens: ids, `TOKEN_BYTES` each."""
        self.remove(key)
        self._chunks[key] = (tenant, tokens)
        for token, name in _windows(tenant, tokens):
            self._windows[name] = (key, token)

    def remove(self, key: RecordKey) -> None:
        """Forget a chunk; an unknown one is ignored."""
        if key not in self._chunks:
            return
        tenant, tokens = self._chunks.pop(key)
        for _, name in _windows(tenant, tokens):
            if self._windows.get(name, (b"",))[0] == key:
                del self._windows[name]

    def clear(self) -> None:
        """Forget all."""
        self._chunks.clear()
        self._windows.clear()

    def find(self, key: RecordKey, tenant: bytes, tokens: bytes) -> Found | None:
        """Those of the tenant's chunks in which most of these tokens occur, at most two.

        key: of the chunk itself, which is not among them. Runs go by their tokens and do not
        overlap. What edits moved inside a chunk is found by shorter windows, of which only these
        two chunks' are compared.
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
            short = _short_runs(tokens, self._chunks[source][1], free)
            runs += [Run(token, number, theirs, length) for token, theirs, length in short]
        return Found(tuple(sources), tuple(sorted(runs))) if runs else None

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
            places = {
                theirs[at : at + size]: at // TOKEN_BYTES
                for at in range(0, len(theirs) - size + 1, TOKEN_BYTES)
            }
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


def _windows(tenant: bytes, tokens: bytes) -> Iterator[tuple[int, int]]:
    """(first token, hash) of the windows that are kept."""
    for token in range(len(tokens) // TOKEN_BYTES - WINDOW + 1):
        at = token * TOKEN_BYTES
        name = hash(tokens[at : at + WINDOW * TOKEN_BYTES])
        if not name % _SAMPLED:
            yield token, hash((tenant, name))


def _length(runs: list[tuple[int, int, int]]) -> int:
    return sum(length for _, _, length in runs)
