"""A secret number hidden in prose, asked for at the end (needle in a haystack)."""

from __future__ import annotations

import random

from kvtc_vllm.evaluation.data.generators import Exercise, needle
from kvtc_vllm.evaluation.tasks.exercise import ExerciseTask


class Needle(ExerciseTask):
    """One needle at a stated depth."""

    name = "needle"
    description = "needle in prose, by depth"
    depths = (0.1, 0.3, 0.5, 0.7)
    first_size = 200

    def exercise(self, rng: random.Random, size: int, depth: float) -> Exercise:
        return needle(rng, "eval", size, depth=depth)
