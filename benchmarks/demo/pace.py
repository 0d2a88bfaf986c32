"""How many conversations the demo holds, so that it ends in minutes on a slow machine, too."""

from __future__ import annotations

import time

from benchmarks.demo import documents
from benchmarks.demo.conversations import MAX_ANSWER_TOKENS, messages
from benchmarks.demo.server import Server

MOST_SECONDS = 600.0
"""For all runs together; packages and the model, made before, take a minute or two."""
FEWEST, MOST = 3, 6
"""With fewer than three conversations a return would not meet a cache full of others."""

TIMED = 8
"""The topic that is timed: not one of those held, and as long as they are in the mean."""
COMPUTED_RUNS, RELOADED_RUNS = 2, 3
"""In which a return is computed, and in which it is reloaded."""
LATER_TURN = 1.15
"""Seconds of a later turn that is computed, over those of the first: its prompt is longer."""
RETURN = 0.35
"""The same of a return that is reloaded, its answer and what it stores included."""


def first_turn_seconds(server: Server) -> float:
    """Seconds of the first turn of a conversation that the demo does not hold."""
    # The first request of all pays for start-up work.
    server.ask([{"role": "user", "content": "Hello."}], MAX_ANSWER_TOKENS)
    chat = documents.chats(documents.MOST_CHATS, documents.FEWEST_TURNS)[TIMED]
    started = time.perf_counter()
    server.ask(messages(chat, [], 0, documents.SYSTEM), MAX_ANSWER_TOKENS)
    return time.perf_counter() - started


def expected_seconds(count: int, first_turn: float, start: float, turns: int) -> float:
    """Of all runs with `count` conversations of so many turns.

    first_turn, start: seconds of a first turn and of starting a server.
    """
    computed = COMPUTED_RUNS * (1 + LATER_TURN * (turns - 1))
    reloaded = RELOADED_RUNS * (1 + RETURN * (turns - 1))
    servers = (COMPUTED_RUNS + RELOADED_RUNS) * start
    return servers + count * first_turn * (computed + reloaded)


def affordable(first_turn: float, start: float, turns: int) -> int:
    """How many conversations end in `MOST_SECONDS`: `FEWEST` at least, and `MOST` at most."""
    for count in range(MOST, FEWEST, -1):
        if expected_seconds(count, first_turn, start, turns) <= MOST_SECONDS:
            return count
    return FEWEST
