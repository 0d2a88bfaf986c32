"""What a client is going to say: the unit of load."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One question.

    text: of the user. output_tokens: most tokens of the answer. think_seconds: between the answer
    before and this question.
    """

    text: str
    output_tokens: int
    think_seconds: float = 0.0


@dataclass(frozen=True)
class Conversation:
    """Turns of one user; answers are the server's.

    system: text of the system message, "" for none. start_seconds: not before this time of the
    test; None: as soon as a client is free.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    start_seconds: float | None = None
