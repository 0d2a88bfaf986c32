"""A directory like the public one, with few and short documents."""

from __future__ import annotations

import gzip
import json
import random
import re
import uuid
from pathlib import Path
from typing import Any

DOCUMENTS = 24


def write_public_data(directory: Path) -> Path:
    """Write all data sets; returns `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    words = re.findall(
        r"\w+", "quick brown fox jumps over lazy dog while wise men look at the moon"
    )

    def sentence() -> str:
        return " ".join(rng.choices(words, k=12)).capitalize() + "."

    def identifier() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128)))

    essays = [{"text": " ".join(sentence() for _ in range(400))} for _ in range(DOCUMENTS)]
    problems = [
        {"question": sentence(), "answer": f"It is {n}.\n#### {n}"} for n in range(60 * DOCUMENTS)
    ]
    records: list[dict[str, Any]] = [
        {"ordered_kv_records": [[identifier(), identifier()] for _ in range(75)]}
        for _ in range(DOCUMENTS)
    ]
    questions = [
        {
            "question": f"who is number {n}",
            "answers": ["nobody at all", f"Person {n}"],
            "ctxs": [
                {"title": f"Title {n}", "text": f"{sentence()} Person {n} is it. {sentence()}"}
            ],
        }
        for n in range(8 * DOCUMENTS)
    ]
    (directory / "gsm8k-test.jsonl").write_bytes(_lines(problems))
    for name, lines in {
        "essays": essays,
        "kv-retrieval-75-keys": records,
        "nq-open-oracle": questions,
    }.items():
        (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(_lines(lines)))
    return directory


def _lines(documents: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()
