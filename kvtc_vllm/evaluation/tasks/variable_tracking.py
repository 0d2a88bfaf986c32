"""Chains of assignments, then the question what a variable holds (variable tracking, RULER)."""

from __future__ import annotations

import random

from kvtc_vllm.evaluation.data.generators import Exercise, variable_tracking
from kvtc_vllm.evaluation.tasks.exercise import ExerciseTask

MAX_CHAINS = 16
CHAIN_SIZE = 100
"""Size units per chain; beyond MAX_CHAINS of them, a unit is a character of prose."""


class VariableTracking(ExerciseTask):
    """Up to 16 chains of one or three hops fill the context; prose after them what is left.

    The answer spells the chain down to its number. The depth of a question is its hops.
    """

    name = "variable-tracking"
    description = "variable tracking with 1 and 3 hops (as RULER)"
    depths = (1, 3)
    label = "{:g} hops"
    first_size = 2 * CHAIN_SIZE

    def exercise(self, rng: random.Random, size: int, depth: float) -> Exercise:
        chains = max(1, min(size // CHAIN_SIZE, MAX_CHAINS))
        characters = max(0, size - MAX_CHAINS * CHAIN_SIZE)
        return variable_tracking(
            rng, "eval", chains, int(depth), questions=1, characters=characters
        )
