"""Prompts as a chat model was taught to read them, and tasks that ask it one question."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from kvtc_vllm.evaluation.data.generators import seeded
from kvtc_vllm.evaluation.data.public import Document, Source
from kvtc_vllm.evaluation.tasks.base import Example, Session, Task, Tokenizer
from kvtc_vllm.evaluation.tasks.exercise import largest_size

Message = tuple[str, str]
"""Role, "user" or "assistant", and content."""


def chat_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """A chat up to where the assistant is to speak: by the model's template if it has one.

    Without a template, messages are paragraphs.
    """
    if tokenizer.chat_template is None:
        return "".join(f"{content}\n\n" for _, content in messages)
    conversation = [{"role": role, "content": content} for role, content in messages]
    return str(
        tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    )


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of what `chat_text` gives. A template brings its own special tokens."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(text, add_special_tokens=True)
    return tokenizer.encode(text, add_special_tokens=False)


class Question(NamedTuple):
    """A chat, the last message the user's, how the reply begins, and how it should go on.

    Earlier messages and the beginning show a small model the form of an answer, so that
    answers can be compared by token.
    """

    messages: Sequence[Message]
    begun: str
    answer: str
    documents: tuple[str, ...]


class DataTask(Task):
    """A task over public documents."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def shuffled(self, name: str, seed: int) -> list[Document]:
        """Documents of the source's part of a data set, in an order that the seed gives.

        Raises DataError.
        """
        documents = list(self.source.documents(name))
        seeded("eval", seed, f"{self.name}/{name}").shuffle(documents)
        return documents


class DialogueTask(DataTask):
    """One question per session, in a prompt as large as the context allows.

    Sessions take the depths in turn; results are told apart by them.
    """

    depths: ClassVar[Sequence[float]]
    """Where in the prompt what is asked for lies, or another degree of difficulty."""
    label: ClassVar[str] = "depth {:g}"
    first_size: ClassVar[int]
    """Size to begin with in the search for the largest prompt."""

    @abstractmethod
    def question(
        self, documents: Sequence[Document], rng: random.Random, size: int, depth: float
    ) -> Question:
        """A question that grows with `size` (characters, pairs, passages).

        documents: of the data set `data_set`, each session from another one on.
        """

    data_set: ClassVar[str]

    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        documents = self.shuffled(self.data_set, seed)
        sessions = []
        for number in range(count):
            depth = self.depths[number % len(self.depths)]
            first = number % len(documents)
            own = documents[first:] + documents[:first]

            def ask(
                size: int,
                number: int = number,
                depth: float = depth,
                own: Sequence[Document] = own,
            ) -> tuple[list[int], Question]:
                rng = seeded("eval", f"{seed}-{number}", self.name)
                question = self.question(own, rng, size, depth)
                text = chat_text(tokenizer, question.messages) + question.begun
                return encode_chat(tokenizer, text), question

            size = largest_size(
                lambda size, ask=ask: len(ask(size)[0]),  # type: ignore[misc]
                context,
                self.first_size,
            )
            prompt, question = ask(size)
            target = tokenizer.encode(question.answer, add_special_tokens=False)
            example = Example(prompt, target, is_answer=True, label=self.label.format(depth))
            sessions.append(Session([example], question.documents))
        return sessions
