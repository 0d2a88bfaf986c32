"""Questions that one of several passages answers (NaturalQuestions, as in Lost in the Middle)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvtc_vllm.evaluation.data.public import Document
from kvtc_vllm.evaluation.tasks.dialogue import DialogueTask, Message, Question

EXAMPLES = 2


def passage(document: Document) -> str:
    """Title and text of the passage that answers a document's question."""
    oracle = document.content["ctxs"][0]
    return f"{oracle['title']}: {oracle['text']}"


def literal_answer(document: Document) -> str | None:
    """The shortest reference answer that its passage contains word for word."""
    text = document.content["ctxs"][0]["text"]
    return min((a for a in document.content["answers"] if a in text), key=len, default=None)


class OpenQuestions(DialogueTask):
    """A question about one of several passages, after two about others as examples."""

    name = "open-questions"
    description = "questions with passages of which one answers, by depth (NQ-open)"
    data_set = "nq-open"
    # No deeper: the last passage is in the recent window.
    depths = (0.0, 0.25, 0.5)
    first_size = 2

    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        answered = [d for d in documents if literal_answer(d)]
        asked, *others = answered[: size + EXAMPLES]
        shown = list(others)
        shown.insert(int(depth * len(others)), asked)
        text = "\n\n".join(passage(document) for document in shown)
        messages: list[Message] = []
        head = f"Read these passages. Answer in their words, shortly.\n\n{text}\n\n"
        for document in others[-EXAMPLES:]:
            messages += [
                ("user", f"{head}Question: {document.content['question']}?"),
                ("assistant", f"Answer: {literal_answer(document)}"),
            ]
            head = ""
        messages.append(("user", f"Question: {asked.content['question']}?"))
        answer = f" {literal_answer(asked)}"
        return Question(messages, "Answer:", answer, tuple(d.name for d in shown))
