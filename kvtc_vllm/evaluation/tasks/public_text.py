"""Running text of public documents: loss per token, and divergence from the exact run."""

from __future__ import annotations

from typing import ClassVar

from kvtc_vllm.evaluation.data.public import LIBRARY, Document
from kvtc_vllm.evaluation.tasks.base import Example, Session, Tokenizer
from kvtc_vllm.evaluation.tasks.dialogue import DataTask

SCORED_TOKENS = 32
"""Each costs a step of the engine for every method, with a model that is no toy."""


class _PublicText(DataTask):
    """Windows of documents: `context` tokens, then 32 that are scored.

    A window begins where the one before it ended; short documents are joined.
    """

    data_set: ClassVar[str]

    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        start = tokenizer.encode("", add_special_tokens=True)
        length = context + SCORED_TOKENS
        sessions: list[Session] = []
        ids, used = list(start), dict[str, None]()
        for document in self.shuffled(self.data_set, seed):
            ids += tokenizer.encode(self.text(document) + "\n\n", add_special_tokens=False)
            used[document.name] = None
            while len(ids) >= length:
                sessions.append(
                    Session([Example(ids[:context], ids[context:length], False)], tuple(used))
                )
                if len(sessions) == count:
                    return sessions
                ids = [*start, *ids[length:]]
                used = {document.name: None}
        raise ValueError(f"{self.name}: the documents have no {count} windows of {context} tokens")

    def text(self, document: Document) -> str:
        """The text of one document."""
        return str(document.content["text"])


class Essays(_PublicText):
    """English prose."""

    name = "essays"
    description = "essays: loss, KL and top-1 agreement over 32 tokens"
    data_set = "essays"


class Library(_PublicText):
    """Python sources out of the packages of the standard library."""

    name = "library"
    description = "Python's standard library: loss, KL and top-1 agreement over 32 tokens"
    data_set = LIBRARY


class Maths(_PublicText):
    """Word problems with worked answers."""

    name = "maths"
    description = "GSM8K with answers: loss, KL and top-1 agreement over 32 tokens"
    data_set = "gsm8k-test"

    def text(self, document: Document) -> str:
        """Question and answer."""
        return f"Question: {document.content['question']}\nAnswer: {document.content['answer']}"
