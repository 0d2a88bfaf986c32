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
    """Three chains; the answer repeats the assignments of one, down to its number.

    The first exchange of the chat is an example, as in RULER.
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
        names = rng.sample(words.NOUNS, (CHAINS + 1) * links)
        chains = []
        for chain in range(CHAINS + 1):
            own = names[chain * links : (chain + 1) * links]
            values = [digits(rng, 4), *own]
            chains.append([f"VAR {n} = {v}." for n, v in zip(own, values, strict=False)])
        example = chains.pop()
        lines = [line for step in zip(*chains, strict=True) for line in step]
        places = sorted(rng.uniform(0, LAST_DEPTH) for _ in lines)
        sentences, used = essay_sentences(documents, size)
        text = strewn(sentences, list(zip(places, lines, strict=True)))
        asked = rng.choice(chains)
        messages = [
            ("user", _request(example, " ".join(example))),
            ("assistant", _answer(example)),
            ("user", _request(asked, text)),
        ]
        begun, equals, answer = _answer(asked).partition(" =")
        return Question(messages, begun + equals, answer, used)


def _request(chain: Sequence[str], text: str) -> str:
    name = chain[-1].split()[1]
    return f"Read this text.\n\n{text}\n\nFollow the assignments of {name} down to its number."


def _answer(chain: Sequence[str]) -> str:
    return " ".join(reversed(chain))
