"""Requests over time: chats, questions about shared documents, a scan."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import accumulate

from benchmarks.store_policy.engine import BLOCK, SimRequest

CHUNK = 128
DOCUMENT_CHUNKS = 8
TURN_TOKENS = 192
ANSWER_TOKENS = 64
TURNS = 8
SKEW = 0.8
"""Of the popularity of documents: the n-th is asked n ** -SKEW times as often as the first."""
BURST_EVERY = 20

Trace = Iterator[SimRequest]


def _hashes(parts: list[tuple[object, int]]) -> list[bytes]:
    """Block hashes of a prompt made of parts, each a name and its tokens."""
    found, names, left = list[bytes](), list[str](), 0
    for name, tokens in parts:
        names.append(repr(name))
        left += tokens
        chain = "/".join(names)
        while left >= BLOCK:
            left -= BLOCK
            found.append(f"{chain}#{len(found)}".encode())
    return found


def request_of(number: int, prompt: list[tuple[object, int]], answer: int) -> SimRequest:
    """A prompt made of parts. Its answer is the part ("answer", number) of later prompts."""
    tokens = sum(size for _, size in prompt)
    hashes = _hashes([*prompt, (("answer", number), answer + BLOCK)])
    return SimRequest(f"r{number}", hashes, tokens, answer)


def documents(chunks: int, requests: int, seed: int) -> Trace:
    """Questions about documents, some of them asked about much more often than others."""
    rng = random.Random(seed)
    count = max(2, chunks // DOCUMENT_CHUNKS)
    weights = list(accumulate((n + 1) ** -SKEW for n in range(count)))
    for number in range(requests):
        (document,) = rng.choices(range(count), cum_weights=weights)
        prompt = [(("document", document), DOCUMENT_CHUNKS * CHUNK), (number, CHUNK)]
        yield request_of(number, prompt, BLOCK)


def scan(chunks: int, requests: int, seed: int) -> Trace:
    """The same documents in the same order, again and again: the worst case of recency."""
    del seed
    count = max(2, chunks // DOCUMENT_CHUNKS)
    for number in range(requests):
        prompt = [(("document", number % count), DOCUMENT_CHUNKS * CHUNK), (number, CHUNK)]
        yield request_of(number, prompt, BLOCK)


def chat(chunks: int, requests: int, seed: int) -> Trace:
    """Users who come back at random with all that was said and a new turn.

    After some turns a user begins anew.
    """
    rng = random.Random(seed)
    turn = TURN_TOKENS + ANSWER_TOKENS
    # Half of a conversation is there on average.
    count = max(2, chunks * CHUNK * 2 // (TURNS * turn))
    turns: list[list[tuple[object, int]]] = [[] for _ in range(count)]
    for number in range(requests):
        user = rng.randrange(count)
        if len(turns[user]) >= 2 * TURNS:
            turns[user] = []
        prompt = [*turns[user], ((user, number), TURN_TOKENS)]
        yield request_of(number, prompt, ANSWER_TOKENS)
        turns[user] = [*prompt, (("answer", number), ANSWER_TOKENS)]


def bursts(chunks: int, requests: int, seed: int, burst_chunks: int) -> Trace:
    """`documents`, and every `BURST_EVERY` requests a prompt of its own of `burst_chunks`."""
    for number, request in enumerate(documents(chunks, requests, seed)):
        yield request
        if number % BURST_EVERY == BURST_EVERY - 1:
            prompt: list[tuple[object, int]] = [(("burst", number), burst_chunks * CHUNK)]
            yield request_of(requests + number, prompt, BLOCK)


TRACES: dict[str, Callable[[int, int, int], Trace]] = {
    "chat": chat,
    "documents": documents,
    "scan": scan,
}
"""Name -> (chunks of the working set, requests, seed) -> requests."""
