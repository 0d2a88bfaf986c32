"""Held-out text: loss per token of the continuation, and divergence from the exact run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from kvtc_vllm.evaluation.data import corpus
from kvtc_vllm.evaluation.data.generators import seeded
from kvtc_vllm.evaluation.tasks.base import Example, Session, Task, Tokenizer

SCORED_TOKENS = 64


class _Text(Task):
    """Windows of held-out documents: `context` tokens, then 64 that are scored."""

    documents: ClassVar[Callable[[corpus.Split], tuple[str, ...]]]

    def sessions(self, tokenizer: Tokenizer, context: int, count: int, seed: int) -> list[Session]:
        windows = self._windows(tokenizer, context + SCORED_TOKENS, seed)
        found = [window for window, _ in zip(windows, range(count), strict=False)]
        if len(found) < count:
            raise ValueError(f"{self.name}: held-out text has no {count} windows of {context}")
        return [Session([Example(ids[:context], ids[context:], is_answer=False)]) for ids in found]

    def _windows(self, tokenizer: Tokenizer, length: int, seed: int) -> Iterator[list[int]]:
        """Windows that begin where a document does; short documents are joined."""
        documents = list(type(self).documents("eval"))
        seeded("eval", seed, self.name).shuffle(documents)
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = list(start)
        for document in documents:
            ids += tokenizer.encode(document + "\n\n", add_special_tokens=False)
            while len(ids) >= length:
                yield ids[:length]
                ids = [*start, *ids[length:]]


class Prose(_Text):
    """English prose: Python's manual and docstrings, files kept from training."""

    name = "prose"
    description = "held-out prose: loss, KL and top-1 agreement over 64 tokens"
    documents = staticmethod(corpus.prose_documents)


class Code(_Text):
    """Python sources kept from training."""

    name = "code"
    description = "held-out Python code: loss, KL and top-1 agreement over 64 tokens"
    documents = staticmethod(corpus.code_documents)
