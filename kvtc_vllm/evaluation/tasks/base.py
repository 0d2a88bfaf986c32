"""What a task of the quality bench is: sessions of prompts with targets to be scored.

Scoring is teacher-forced: the engine is made to generate exactly the target, and
the probabilities that it gave to each target token are recorded (`replay/scoring.py`).
That yields the loss, the divergence from the uncompressed run and, for an answer,
whether greedy decoding would have produced it: it would if and only if every
token of the target is the most likely one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that tasks use."""

    bos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """A conversation as the model was taught to read it; a string unless tokenized."""
        ...


@dataclass(frozen=True)
class Example:
    """One prompt and what should follow it, as token ids.

    is_answer: the target is an answer that is right or wrong, not running text.
    label: what rows are told apart by besides the context, such as "depth 0.5".
    """

    prompt: list[int]
    target: list[int]
    is_answer: bool
    label: str = ""


@dataclass(frozen=True)
class Session:
    """Prompts of which each begins with the one before it; mostly there is only one.

    With several, the prefix of each is reloaded from what the replays of the earlier
    ones stored, so that errors can compound as they would in a chat.
    documents: names of the public documents in the prompts; none if they are generated.
    """

    turns: list[Example]
    documents: tuple[str, ...] = ()


class Task(ABC):
    """Makes sessions. Same arguments, same sessions."""

    name: ClassVar[str]
    description: ClassVar[str]

    @abstractmethod
    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        """`count` sessions with prompts of about, and not above, `context` tokens."""


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt, with the model's beginning-of-sequence token if it has one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]
