"""Texts of several kinds to calibrate a chat model on: of which SmolLM2's shipped artifact is made.

    python -m benchmarks.calibration_texts --data DIR --out smollm2-texts.jsonl

Chats about docstrings of the standard library, sources of its top-level modules, worked
grade-school maths, passages with questions, and keys with values, in turns. What comes from
`--data` is the part for calibration. No page of Python's language reference is in it: the demo
asks about those.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.demo import calibration_text
from kvtc_vllm.evaluation.data.public import DataError, Source

PIECE = 7000
"""Characters of a text, some 1,800 tokens. Sources and passages are cut or joined to it."""
PAIRS = 40
"""Keys with values per retrieval prompt, some 3,000 tokens."""
CHARACTERS = 900_000
"""In all by default, some 240,000 tokens: `kvtc calibrate` takes half of what it runs."""
RETRIEVAL_EVERY = 3
"""Rounds through the other kinds per retrieval prompt; its keys are random digits."""

Text = dict[str, Any]


def main() -> int:
    """Write the texts; exit status 0 if there were enough of each kind."""
    parser = argparse.ArgumentParser(prog="benchmarks.calibration_texts", description=__doc__)
    parser.add_argument("--data", required=True, help="directory of the public data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=CHARACTERS)
    args = parser.parse_args()
    source = Source(args.data, "calibrate")
    written = 0
    try:
        with args.out.open("w", encoding="utf-8") as file:
            for text in texts(source):
                line = json.dumps(text)
                file.write(line + "\n")
                written += len(line)
                if written >= args.characters:
                    return 0
    except DataError as error:
        print(f"calibration_texts: {error}", file=sys.stderr)
        return 1
    print(
        f"calibration_texts: a kind ended after {written} characters in all; "
        f"--characters {args.characters}: give less",
        file=sys.stderr,
    )
    return 1


def texts(source: Source) -> Iterator[Text]:
    """JSON lines of `kvtc calibrate`, kinds in turns, until one of them ends. Raises DataError."""
    library = Path(sysconfig.get_path("stdlib"))
    kinds = (
        ({"messages": chat} for chat in calibration_text.chats(library)),
        _cut(path.read_text(encoding="utf-8", errors="ignore") for path in _modules(library)),
        _joined(_maths(source)),
        _joined(_passages(source)),
    )
    for number, each in enumerate(zip(*kinds, strict=False)):
        yield from each
        if number % RETRIEVAL_EVERY == 0:
            yield _retrieval(source, number // RETRIEVAL_EVERY)


def _modules(library: Path) -> list[Path]:
    return sorted(path for path in library.glob("*.py") if path.stat().st_size >= PIECE)


def _cut(sources: Iterable[str]) -> Iterator[Text]:
    """The first piece of every source: more of one would be more of the same names."""
    return ({"text": text[:PIECE]} for text in sources)


def _joined(parts: Iterable[str]) -> Iterator[Text]:
    text = ""
    for part in parts:
        text += part + "\n\n"
        if len(text) >= PIECE:
            yield {"text": text}
            text = ""


def _maths(source: Source) -> Iterator[str]:
    for document in source.documents("gsm8k-test"):
        yield f"Question: {document.content['question']}\nAnswer: {document.content['answer']}"


def _passages(source: Source) -> Iterator[str]:
    for document in source.documents("nq-open"):
        content = document.content
        passages = [f"{passage['title']}\n{passage['text']}" for passage in content["ctxs"][:2]]
        asked = f"Question: {content['question']}?\nAnswer: {content['answers'][0]}"
        yield "\n\n".join([*passages, asked])


def _retrieval(source: Source, number: int) -> Text:
    documents = source.documents("kv-retrieval")
    records = documents[number % len(documents)].content["ordered_kv_records"]
    pairs = list(itertools.islice(records, PAIRS))
    key, value = pairs[(7 * number) % len(pairs)]
    listed = "\n".join(f'"{one}": "{other}"' for one, other in pairs)
    asked = f"Here are keys with values.\n\n{listed}\n\nWhat is the value of {key}?"
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": value},
        ]
    }


if __name__ == "__main__":
    sys.exit(main())
