"""Chains of assignments in essays, then the question what a variable holds (as RULER)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from kvtc_vllm.evaluation.data import words
from kvtc_vllm.evaluation.data.generators import digits
from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Message, Question
from kvtc_vllm.evaluation.tasks.essay_text import essay_sentences, strewn

CHAINS = 2
EXAMPLE_HOPS = (2, 1)
LAST_DEPTH = 0.7
"""Assignments lie before this share of the text, since its end is in the recent window."""


class EssayVariables(DialogueTask):
    """Two chains; the answer spells one of them down to its number.

    The first exchanges of the chat are examples without a text, as in RULER.
    """

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
        names = iter(rng.sample(words.NOUNS, CHAINS * links + sum(EXAMPLE_HOPS) + 2))

        def chain(length: int) -> list[str]:
            """Names down to the number that the last of them holds."""
            return [*(next(names) for _ in range(length)), digits(rng, 4)]

        messages: list[Message] = []
        for hops in EXAMPLE_HOPS:
            example = chain(hops + 1)
            messages += [
                ("user", _request(example[0], " ".join(_assignments(example)))),
                ("assistant", " = ".join(example)),
            ]
        chains = [chain(links) for _ in range(CHAINS)]
        lines = [line for step in zip(*map(_assignments, chains), strict=True) for line in step]
        places = sorted(rng.uniform(0, LAST_DEPTH) for _ in lines)
        sentences, used = essay_sentences(documents, size)
        text = strewn(sentences, list(zip(places, lines, strict=True)))
        name, *rest = rng.choice(chains)
        messages.append(("user", _request(name, text)))
        return Question(messages, f"{name} =", f" {' = '.join(rest)}", used)


def _assignments(chain: Sequence[str]) -> list[str]:
    """Lines of a chain, the one with the number first."""
    return [f"{name} = {value}." for name, value in reversed(list(pairwise(chain)))]


def _request(name: str, text: str) -> str:
    return f"Read this text.\n\n{text}\n\nFollow {name} down to its number."
