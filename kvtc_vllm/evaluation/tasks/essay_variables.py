"""Assignments in essays, then the question what a variable holds (as RULER, without hops)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from kvtc_vllm.evaluation.data import words
from kvtc_vllm.evaluation.data.generators import digits
from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Message, Question
from kvtc_vllm.evaluation.tasks.essay_text import essay_sentences, strewn

ASSIGNMENTS = 4
EXAMPLES = 2
LAST_DEPTH = 0.7
"""Assignments lie before this share of the text, since its end is in the recent window."""


class EssayVariables(DialogueTask):
    """Four variables; the answer is the number of one of them, at a stated depth.

    The first exchanges of the chat are examples without a text, as in RULER. RULER's chains, in
    which variables hold variables, are beyond the small models that can be measured on a CPU.
    """

    name = "essay-variables"
    description = "a variable's number among four assignments in essays, by depth (as RULER)"
    data_set = "essays"
    # Of the assignments, which lie in order of their depth.
    depths = (0.0, 0.25, 0.5, 0.75)
    first_size = 1000

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        names = iter(rng.sample(words.NOUNS, (EXAMPLES + 1) * ASSIGNMENTS))

        def variables() -> dict[str, str]:
            return {next(names): digits(rng, 4) for _ in range(ASSIGNMENTS)}

        messages: list[Message] = []
        for _ in range(EXAMPLES):
            example = variables()
            name = rng.choice(list(example))
            messages += [
                ("user", _request(name, " ".join(_lines(example)))),
                ("assistant", f"{name} = {example[name]}"),
            ]
        values = variables()
        places = sorted(rng.uniform(0, LAST_DEPTH) for _ in values)
        sentences, used = essay_sentences(documents, size)
        text = strewn(sentences, list(zip(places, _lines(values), strict=True)))
        name = list(values)[int(depth * len(values))]
        messages.append(("user", _request(name, text)))
        return Question(messages, f"{name} =", f" {values[name]}", used)


def _lines(values: Mapping[str, str]) -> list[str]:
    return [f"{name} = {value}." for name, value in values.items()]


def _request(name: str, text: str) -> str:
    return f"Read this text.\n\n{text}\n\nFollow {name} down to its number."
