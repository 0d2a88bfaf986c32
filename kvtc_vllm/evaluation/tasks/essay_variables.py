"""Chains of assignments in essays, then the question what a variable holds (as RULER)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvtc_vllm.evaluation.data import words
from kvtc_vllm.evaluation.data.generators import digits
from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Question
from kvtc_vllm.evaluation.tasks.essay_text import essay_sentences, strewn

CHAINS = 3
LAST_DEPTH = 0.7
"""Assignments lie before this share of the text, since its end is in the recent window."""


class EssayVariables(DialogueTask):
    """Three chains; the answer spells one of them down to its number."""

    name = "essay-variables"
    description = "variable tracking in essays, with 1 and 2 hops (as RULER)"
    data_set = "essays"
    depths = (1, 2)
    label = "{:g} hops"
    first_size = 1000

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        links = int(depth) + 1
        names = rng.sample(words.NOUNS, CHAINS * links)
        chains = []
        for chain in range(CHAINS):
            own = names[chain * links : (chain + 1) * links]
            chains.append(list(zip(own, [digits(rng, 4), *own], strict=False)))
        lines = [
            f"VAR {name} = {value}." for step in zip(*chains, strict=True) for name, value in step
        ]
        places = sorted(rng.uniform(0, LAST_DEPTH) for _ in lines)
        sentences, used = essay_sentences(documents, size)
        text = strewn(sentences, list(zip(places, lines, strict=True)))
        asked = list(reversed(rng.choice(chains)))
        user = (
            "Read this text. It assigns values to variables.\n\n"
            f"{text}\n\nFollow the assignments of {asked[0][0]} down to its number."
        )
        answer = " = ".join(value for _, value in asked)
        return Question(user, f"VAR {asked[0][0]} =", f" {answer}", used)
