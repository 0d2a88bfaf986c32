"""The two passes: run every prompt exactly and store it, drop the GPU cache, replay.

The exact pass is the reference of the replay. Whether the replayed prefix really
came from the tier is not assumed: the connector's counters must say so to the token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvtc_vllm.evaluation.job import Record, StoredBytes, make_record
from kvtc_vllm.evaluation.replay.engine import ReplayEngine, Request
from kvtc_vllm.evaluation.scores import Scores
from kvtc_vllm.evaluation.tasks import Session

BATCH = 64
"""Sessions scored in one go: bounds the space for their score files."""


Batch = list[tuple[int, Session]]
"""Sessions and their numbers."""
Exact = dict[tuple[int, int], Scores]
"""Of exact runs, by number of the session and of the turn."""


class ReplayError(RuntimeError):
    """A replay did not do what it was to measure; its scores are worthless."""


def replay(
    engine: ReplayEngine,
    task: str,
    context: int,
    sessions: Sequence[Session],
    directory: Path,
    progress: Callable[[int], None],
) -> tuple[list[Record], StoredBytes]:
    """Replay all sessions of one task at one context. Raises ReplayError.

    progress: called with the number of prompts finished, two for each example.
    """
    before = engine.counters()
    records: list[Record] = []
    for batch in batches(sessions):
        with exact_pass(engine, task, context, batch, directory, progress) as exact:
            records += replay_pass(engine, task, context, batch, directory, exact, progress)
    after = engine.counters()
    stored = StoredBytes(
        task=task,
        context=context,
        raw=int(grown(before, after, "stored_raw_bytes")),
        stored=int(grown(before, after, "stored_bytes")),
    )
    return records, stored


def batches(sessions: Sequence[Session]) -> Iterator[Batch]:
    """Sessions with their numbers, `BATCH` at a time."""
    for first in range(0, len(sessions), BATCH):
        yield list(enumerate(sessions[first : first + BATCH], start=first))


@contextlib.contextmanager
def exact_pass(
    engine: ReplayEngine,
    task: str,
    context: int,
    batch: Batch,
    directory: Path,
    progress: Callable[[int], None],
) -> Iterator[Exact]:
    """Run a batch exactly and store it; what `replay_pass` needs while this lasts.

    Gives scores by session and turn. Raises ReplayError.
    """
    place = directory / f"{task}-{context}"
    place.mkdir(exist_ok=True)
    turns = _turns(batch)
    chats = len(turns) > 1
    exact: Exact = {}
    for turn in turns:
        present = [(number, s.turns[turn]) for number, s in batch if turn < len(s.turns)]
        # A chat's replays store their own chunks; its exact run must not leave any for them.
        requests = [
            Request(
                example,
                salt=_salt(task, context, number, f"exact {turn}" if chats else ""),
                result=place / f"exact-{number}-{turn}.npz",
                exact=True,
            )
            for number, example in present
        ]
        scores = _run_checked(engine, requests, expected=0)
        exact |= {(number, turn): s for (number, _), s in zip(present, scores, strict=True)}
        progress(len(present))
    engine.drop_gpu_cache()
    yield exact
    for path in place.iterdir():
        path.unlink()


def replay_pass(
    engine: ReplayEngine,
    task: str,
    context: int,
    batch: Batch,
    directory: Path,
    exact: Exact,
    progress: Callable[[int], None],
    method: str = "",
) -> Iterator[Record]:
    """Replay a batch that was stored by `exact_pass`, which still lasts. Raises ReplayError.

    method: name of the method, if several replay the same batch. Chats store what they replay,
    so each method needs chunks of its own.
    """
    place = directory / f"{task}-{context}"
    turns = _turns(batch)
    chats = len(turns) > 1
    for turn in turns:
        left = [(number, s.turns) for number, s in batch if turn < len(s.turns)]
        requests, reloads = [], []
        for number, own in left:
            stored = 0 if chats and turn == 0 else len(own[max(0, turn - 1)].prompt)
            reloads.append(engine.reloadable(stored, len(own[turn].prompt)))
            requests.append(
                Request(
                    own[turn],
                    salt=_salt(task, context, number, method if chats else ""),
                    result=place / f"replay-{number}-{turn}.npz",
                    reference=place / f"exact-{number}-{turn}.npz",
                )
            )
        scores = _run_checked(engine, requests, expected=sum(reloads))
        engine.drop_gpu_cache()
        for (number, own), reloaded, score in zip(left, reloads, scores, strict=True):
            before = exact[number, turn]
            yield make_record(task, context, number, own[turn], reloaded, before, score)
        progress(len(left))


def _turns(batch: Batch) -> range:
    return range(max(len(session.turns) for _, session in batch))


def _run_checked(engine: ReplayEngine, requests: list[Request], expected: int) -> list[Scores]:
    with confirmed(engine, expected):
        return engine.run(requests)


@contextlib.contextmanager
def confirmed(engine: ReplayEngine, expected: int) -> Iterator[None]:
    """While this lasts, exactly `expected` tokens must come from the tier. Raises ReplayError."""
    before = engine.counters()
    yield
    after = engine.counters()
    loaded = grown(before, after, "loaded_tokens")
    failed = grown(before, after, "failed_loads")
    dropped = grown(before, after, "dropped_stores")
    if loaded != expected or failed or dropped:
        raise ReplayError(
            f"{loaded:.0f} tokens came from the tier, {expected} should have; "
            f"{failed:.0f} loads failed, {dropped:.0f} stores were dropped"
        )


def _salt(task: str, context: int, session: int, what: str) -> str:
    return f"{task}/{context}/{session}/{what}"


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """By how much the counter `name` grew between two readings."""
    return after.get(name, 0.0) - before.get(name, 0.0)
