"""Documents of several kinds to measure KL on, each cut into what is stored, exact and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sensitivity_gradients import TEXTS
from kvtc_vllm.evaluation.data.public import Source
from kvtc_vllm.evaluation.tasks import CHATS, open_task

PREFIX, WINDOW, SCORED = 768, 128, 128
PROMPT_PREFIX, PROMPT_CONTEXT = 640, 900
CHAT_CONTEXT = 1100


@dataclass(frozen=True)
class Text:
    """kind: the task that it is of. ids: prefix, exact and scored tokens.

    prefix: how many go through the codec. scored: how many of the last ones are predicted.
    """

    kind: str
    name: str
    ids: list[int]
    prefix: int
    scored: int


def texts(
    tokenizer: Any, source: Source, kinds: Sequence[str], documents: int, prompts: int
) -> Iterator[Text]:
    """Of every kind, kinds in turn.

    documents: of each kind of running text, of which 128 tokens are scored after 768 + 128.
    prompts: of each other kind. A prompt of one answer is scored on it alone; a chat, taken with
    its last answer, on its last 128 tokens, which are the last message and the answer.
    """
    found = []
    for kind in kinds:
        running, chat = kind in TEXTS, kind in CHATS
        context = PREFIX + WINDOW + SCORED - 32 if running else PROMPT_CONTEXT
        sessions = open_task(kind, source).sessions(
            tokenizer, CHAT_CONTEXT if chat else context, documents if running else prompts, 0
        )
        rows = []
        for session in sessions:
            example = session.turns[-1]
            ids = example.prompt + example.target
            scored = SCORED if running or chat else len(example.target)
            prefix = PREFIX if running or chat else PROMPT_PREFIX
            rows.append(Text(kind, ", ".join(session.documents), ids, prefix, scored))
        found.append(rows)
    for number in range(max(map(len, found))):
        for rows in found:
            yield from rows[number : number + 1]
