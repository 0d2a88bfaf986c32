"""Which words of a long list are the frequent ones (common words extraction, RULER)."""

from __future__ import annotations

import random

from kvtc_vllm.evaluation.data.generators import Exercise, common_words
from kvtc_vllm.evaluation.tasks.exercise import ExerciseTask


class CommonWords(ExerciseTask):
    """Three common words among twenty rare ones."""

    name = "common-words"
    description = "common words extraction (as RULER)"
    label = ""
    first_size = 40

    def exercise(self, rng: random.Random, size: int, depth: float) -> Exercise:
        return common_words(rng, "eval", size)
