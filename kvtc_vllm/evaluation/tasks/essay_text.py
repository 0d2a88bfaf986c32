"""Essays as the haystack of other tasks: sentences, with lines put between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvtc_vllm.evaluation.data.public import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def essay_sentences(
    documents: Sequence[Document], characters: int
) -> tuple[list[str], tuple[str, ...]]:
    """Sentences of `characters` characters in all, and the names of their essays.

    The last sentence is cut where the characters end. Documents are taken in order.
    """
    sentences: list[str] = []
    used: list[str] = []
    left = characters
    for document in documents:
        if left <= 0:
            break
        used.append(document.name)
        for sentence in _SENTENCE_END.split(" ".join(document.content["text"].split())):
            if left <= 0:
                break
            sentences.append(sentence[:left])
            left -= len(sentence) + 1
    return sentences, tuple(used)


def strewn(sentences: Sequence[str], lines: Sequence[tuple[float, str]]) -> str:
    """Text with lines put between its sentences.

    lines: where, as a share of the sentences, and what; in the order in which they are to stand.
    """
    parts = list(sentences)
    for depth, line in reversed(lines):
        parts.insert(round(depth * len(sentences)), line)
    return " ".join(parts)
