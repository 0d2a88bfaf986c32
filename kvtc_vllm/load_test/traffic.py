"""Made-up conversations: shared prefixes, a pool of documents, Zipf popularity, think times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from kvtc_vllm.load_test.conversation import Conversation, Turn
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.words import text


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked. Raises LoadTestError, naming the field, for values out of range.

    conversations: in all. turns: questions per conversation. think_seconds: mean time between an
    answer and the next question, drawn from an exponential distribution; 0: none.
    prefixes: different system messages. prefix_tokens: tokens of each; 0: no system message.
    documents: size of the pool; 0: a document of its own per conversation.
    document_tokens: tokens of each; 0: no documents. zipf: exponent of the popularity of documents
    and prefixes; 0: all alike. question_tokens, answer_tokens: per turn. seed: of all that is
    drawn. Numbers of tokens are about right, see `words`.
    """

    conversations: int = 16
    turns: int = 4
    think_seconds: float = 1.0
    prefixes: int = 1
    prefix_tokens: int = 128
    documents: int = 0
    document_tokens: int = 1024
    zipf: float = 1.0
    question_tokens: int = 32
    answer_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise LoadTestError(f"{name} is {value}, {least} or more is right")


_LEAST = {
    "conversations": 1,
    "turns": 1,
    "think_seconds": 0,
    "prefixes": 1,
    "prefix_tokens": 0,
    "documents": 0,
    "document_tokens": 0,
    "zipf": 0,
    "question_tokens": 1,
    "answer_tokens": 1,
}


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Probabilities of `count` things by rank: proportional to rank ** -exponent, sum 1."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class Script:
    """What was drawn for one conversation.

    prefix, document: numbers within their pools; a document of no pool has the conversation's.
    think_seconds: before each turn.
    """

    prefix: int
    document: int
    think_seconds: tuple[float, ...]


def scripts(traffic: Traffic) -> list[Script]:
    """One per conversation, in order of their start. Equal traffic gives equal scripts."""
    draw = random.Random(traffic.seed)
    documents = _drawn(draw, traffic.documents, traffic)
    prefixes = _drawn(draw, traffic.prefixes, traffic)
    return [
        Script(
            prefix, document, tuple(_think(draw, turn, traffic) for turn in range(traffic.turns))
        )
        for prefix, document in zip(prefixes, documents, strict=True)
    ]


def conversations(traffic: Traffic) -> list[Conversation]:
    """The scripts with their texts."""
    return [_conversation(traffic, *numbered) for numbered in enumerate(scripts(traffic))]


def _think(draw: random.Random, turn: int, traffic: Traffic) -> float:
    if not turn or not traffic.think_seconds:
        return 0.0
    return draw.expovariate(1 / traffic.think_seconds)


def _drawn(draw: random.Random, count: int, traffic: Traffic) -> Sequence[int]:
    """For each conversation one of `count` things; its own number if there is no pool."""
    if not count:
        return range(traffic.conversations)
    bounds = list(accumulate(zipf_weights(count, traffic.zipf)))
    return draw.choices(range(count), cum_weights=bounds, k=traffic.conversations)


def _conversation(traffic: Traffic, number: int, script: Script) -> Conversation:
    turns = []
    for turn, think in enumerate(script.think_seconds):
        words = text(traffic.question_tokens, traffic.seed, "question", number, turn)
        if turn == 0 and traffic.document_tokens:
            read = text(traffic.document_tokens, traffic.seed, "document", script.document)
            words = f"{read}\n\n{words}"
        turns.append(Turn(words, traffic.answer_tokens, think))
    system = ""
    if traffic.prefix_tokens:
        system = text(traffic.prefix_tokens, traffic.seed, "prefix", script.prefix)
    return Conversation(tuple(turns), system)
