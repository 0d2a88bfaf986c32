"""How far back attention looks: which tokens of a prefix the next token needs.

vLLM allocates blocks for exactly these tokens when it resumes behind a prefix, rounded down to
whole blocks, and gives the blocks before them back while a request runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Reach(Protocol):
    """One kind of attention. `str` names it, and `named_reach` reads the name."""

    def first_needed(self, end: int) -> int:
        """Position of the first token that is needed to compute the one at position `end`.

        Never falls as `end` grows. `end` itself where none is.
        """
        ...


@dataclass(frozen=True)
class FullAttention:
    """Every token before."""

    def __str__(self) -> str:
        return "full"

    def first_needed(self, end: int) -> int:
        return 0


FULL = FullAttention()


@dataclass(frozen=True)
class SlidingWindow:
    """The last `tokens` tokens, the one that is computed among them."""

    tokens: int

    def __str__(self) -> str:
        return f"window {self.tokens}"

    def first_needed(self, end: int) -> int:
        return max(0, end - self.tokens + 1)


@dataclass(frozen=True)
class LastState:
    """A recurrence: the state after the token before, and nothing else."""

    def __str__(self) -> str:
        return "state"

    def first_needed(self, end: int) -> int:
        return max(0, end - 1)


@dataclass(frozen=True)
class ChunkedLocal:
    """The tokens since the last multiple of `tokens`."""

    tokens: int

    def __str__(self) -> str:
        return f"local {self.tokens}"

    def first_needed(self, end: int) -> int:
        return end // self.tokens * self.tokens


_SIZED: dict[str, Callable[[int], Reach]] = {"window": SlidingWindow, "local": ChunkedLocal}


def named_reach(name: str) -> Reach:
    """The attention of a name, such as "full" or "window 512". Raises ValueError for others."""
    if name in (str(FULL), str(LastState())):
        return FULL if name == str(FULL) else LastState()
    word, _, tokens = name.partition(" ")
    if word not in _SIZED or not tokens.isdecimal() or int(tokens) < 1:
        raise ValueError(
            f"attention {name!r} is not known; full, state, window N and local N are right"
        )
    return _SIZED[word](int(tokens))
