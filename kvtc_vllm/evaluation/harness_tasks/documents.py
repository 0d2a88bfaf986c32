"""What the task definitions beside this file call. lm-eval gives its metadata as arguments."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from kvtc_vllm.evaluation.data.public import Part, Source
from kvtc_vllm.evaluation.tasks.open_questions import literal_answer, passage

PASSAGES = 4
"""Passages per prompt; the answers to their questions are the choices."""


def gsm8k(data: str, part: Part, **_: Any) -> dict[str, Dataset]:
    """Problems with worked answers, in an order that is always the same."""
    contents = [document.content for document in Source(data, part).documents("gsm8k-test")]
    random.Random(0).shuffle(contents)
    return {"test": Dataset.from_list(contents)}


def passage_choice(data: str, part: Part, **_: Any) -> dict[str, Dataset]:
    """Questions about one of four passages. The answers to all four questions are the choices."""
    documents = [d for d in Source(data, part).documents("nq-open") if literal_answer(d)]
    random.Random(0).shuffle(documents)
    found: list[dict[str, Any]] = []
    for first in range(0, len(documents) - PASSAGES + 1, PASSAGES):
        group = documents[first : first + PASSAGES]
        answers = [literal_answer(document) for document in group]
        if len(set(answers)) < PASSAGES:
            continue
        # Not the last passage: it is in the recent window.
        asked = len(found) % (PASSAGES - 1)
        found.append(
            {
                "passages": "\n\n".join(map(passage, group)),
                "question": group[asked].content["question"],
                "choices": answers,
                "right": asked,
            }
        )
    return {"test": Dataset.from_list(found)}


def loss(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Nats of the reference answer, all tokens together."""
    ((log_likelihood, _),) = results
    return {"nll": -log_likelihood}
