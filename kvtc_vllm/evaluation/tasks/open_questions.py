"""Questions that one of several passages answers (NaturalQuestions, as in Lost in the Middle)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Question


def passage(document: Document) -> str:
    """Title and text of the passage that answers a document's question."""
    oracle = document.content["ctxs"][0]
    return f"{oracle['title']}: {oracle['text']}"


def literal_answer(document: Document) -> str | None:
    """The first reference answer that its passage contains word for word."""
    text = document.content["ctxs"][0]["text"]
    return next((answer for answer in document.content["answers"] if answer in text), None)


class OpenQuestions(DialogueTask):
    """The passage that answers is among those of other questions."""

    name = "open-questions"
    description = "questions with passages of which one answers, by depth (NQ-open)"
    data_set = "nq-open"
    # No deeper: the last passage is in the recent window.
    depths = (0.0, 0.25, 0.5)
    first_size = 2

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        asked = next(d for d in documents if literal_answer(d))
        others = [d for d in documents if d is not asked][: max(0, size - 1)]
        shown = list(others)
        shown.insert(int(depth * size), asked)
        passages = "\n\n".join(passage(document) for document in shown)
        user = (
            f"Read these passages.\n\n{passages}\n\n"
            f"Question: {asked.content['question']}?\n"
            "Answer in the words of the passages, as shortly as possible."
        )
        answer = literal_answer(asked)
        return Question(user, "Answer:", f" {answer}", tuple(d.name for d in shown))
