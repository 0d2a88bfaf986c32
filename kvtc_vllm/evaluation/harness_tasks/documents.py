"""What the task definitions beside this file call. lm-eval gives its metadata as arguments."""

from __future__ import annotations

import random
from typing import Any

from kvtc_vllm.evaluation.data.public import Part, Source
from kvtc_vllm.evaluation.tasks.open_questions import literal_answer, passage

PASSAGES = 4
"""Passages per prompt; the answers to their questions are the choices."""


def gsm8k(data: str, part: Part, **_: Any) -> dict[str, list[dict[str, Any]]]:
    """Problems with worked answers, in an order that is always the same."""
    return {"test": _shuffled(Source(data, part), "gsm8k-test")}


def passage_choice(data: str, part: Part, **_: Any) -> dict[str, list[dict[str, Any]]]:
    """Questions about one of four passages. The answers to all four questions are the choices."""
    documents = [d for d in Source(data, part).documents("nq-open") if literal_answer(d)]
    random.Random(0).shuffle(documents)
    found = []
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
    return {"test": found}


def loss(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Nats of the reference answer, all tokens together."""
    ((log_likelihood, _),) = results
    return {"nll": -log_likelihood}


def _shuffled(source: Source, name: str) -> list[dict[str, Any]]:
    contents = [document.content for document in source.documents(name)]
    random.Random(0).shuffle(contents)
    return contents
