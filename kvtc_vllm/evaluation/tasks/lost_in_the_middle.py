"""Look-ups in a table of names and numbers (after "Lost in the Middle", arXiv 2307.03172)."""

from __future__ import annotations

import random

from kvtc_vllm.evaluation.data.generators import Exercise, kv_retrieval
from kvtc_vllm.evaluation.tasks.exercise import ExerciseTask


class LostInTheMiddle(ExerciseTask):
    """One pair is asked for; the table fills the context."""

    name = "litm"
    description = "key-value retrieval by depth (as LITM)"
    # No deeper: the end of a short table is in the recent window.
    depths = (0.0, 0.2, 0.4, 0.6)
    first_size = 8

    def exercise(self, rng: random.Random, size: int, depth: float) -> Exercise:
        return kv_retrieval(rng, "eval", size, asked=[int(depth * size)])
