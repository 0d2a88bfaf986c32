"""A number hidden in essays, asked for at the end (needle in a haystack)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvtc_vllm.evaluation.data import words
from kvtc_vllm.evaluation.data.generators import digits
from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Question
from kvtc_vllm.evaluation.tasks.essay_text import essay_sentences, strewn


class EssayNeedle(DialogueTask):
    """One needle at a stated depth."""

    name = "essay-needle"
    description = "needle in essays, by depth"
    data_set = "essays"
    depths = (0.1, 0.3, 0.5, 0.7)
    first_size = 1000

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        city, number = rng.choice(words.CITIES), digits(rng, 5)
        fact = f"The secret number of {city} is"
        sentences, used = essay_sentences(documents, size)
        text = strewn(sentences, [(depth, f"{fact} {number}.")])
        user = f"Read this text.\n\n{text}\n\nWhat is the secret number of {city}?"
        return Question([("user", user)], fact, f" {number}", used)
