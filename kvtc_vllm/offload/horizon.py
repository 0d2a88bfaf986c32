"""How far ahead of vLLM's evictions chunks are stored: blocks that coming steps may take."""

from __future__ import annotations

FADES = 0.9
"""Per step, of the most blocks that one step took."""
LARGEST_STEPS = 2
"""To look ahead where nothing may be left to the last moment."""


class Horizon:
    """Used by the scheduler's thread only.

    fixed: a number of blocks instead, 0 for none. step_blocks: most blocks that one step's tokens
    can take. all_of_it: look ahead so far that nothing is left to the last moment.
    """

    def __init__(self, fixed: int | None, step_blocks: int, all_of_it: bool = False) -> None:
        self._fixed = fixed
        self._step_blocks = step_blocks
        self._all_of_it = all_of_it
        self._most = 0.0

    def step_took(self, blocks: int) -> None:
        """Note how many blocks the step that is being planned takes."""
        self._most = max(float(blocks), self._most * FADES)

    @property
    def blocks(self) -> int:
        """Of those that are free and handed out first."""
        if self._all_of_it:
            return max(LARGEST_STEPS * self._step_blocks, self._fixed or 0)
        if self._fixed is not None:
            return self._fixed
        # What lately one step took, the next may take. More is copied when it is taken.
        return round(self._most)
