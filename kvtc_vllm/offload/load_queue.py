"""The loads that run, in the order in which they began, and what is left of each.

Threads take loads in this order, so tokens that were loaded belong to the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class QueuedLoad:
    """A load that runs."""

    tokens: int
    left: int
    """Tokens that are not loaded yet."""
    began: float
    """On the clock."""
    before: int
    """Tokens that the engine would have had to compute before its own, when it began."""
    patience: float
    """Seconds from then on after which it is of no use; 0 for no limit."""
    on_trial: bool = False
    """It was offered against what is expected, and runs until its patience ends."""
    wanted: bool = True
    """False once its request has ended."""
    given_up: bool = False
    """Its end was ordered and not reported yet."""


class LoadQueue:
    """Used by the scheduler's thread only."""

    def __init__(self) -> None:
        self._loads: dict[str, QueuedLoad] = {}
        self._shortest: int | None = None
        self.left = 0
        """Tokens of all that is to be loaded."""

    def begin(self, request_id: str, load: QueuedLoad) -> None:
        """Add a load behind all others."""
        self.end(request_id)
        self._loads[request_id] = load
        self.left += load.left
        self._shortest = None

    def progress(self, tokens: int) -> None:
        """Take note that so many tokens were loaded."""
        for load in self._loads.values():
            done = min(tokens, load.left)
            load.left -= done
            self.left -= done
            tokens -= done
            if not tokens:
                break

    def give_up(self, load: QueuedLoad) -> None:
        """Take note that nothing more of it will be loaded."""
        self.left -= load.left
        load.left = 0
        load.given_up = True

    def end(self, request_id: str) -> QueuedLoad | None:
        """Drop a load that has ended, well or not."""
        load = self._loads.pop(request_id, None)
        if load is not None:
            self.left -= load.left
            self._shortest = None
        return load

    def get(self, request_id: str) -> QueuedLoad | None:
        """A load that runs."""
        return self._loads.get(request_id)

    def running(self) -> Iterator[tuple[str, QueuedLoad]]:
        """Request and load, those first that began first, without those that were given up."""
        return ((name, load) for name, load in self._loads.items() if not load.given_up)

    @property
    def shortest(self) -> int:
        """Fewest tokens of a load; 0 if none runs."""
        if self._shortest is None:
            self._shortest = min((load.tokens for load in self._loads.values()), default=0)
        return self._shortest

    def __len__(self) -> int:
        return len(self._loads)
