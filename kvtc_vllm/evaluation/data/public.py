"""Public data sets in a directory that the user names, in three disjoint parts.

Documents are numbered by their line. The number modulo 4 says to which part one belongs:
what a basis is fitted on, what sizes and defaults are chosen on, and what is reported.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from kvtc_vllm.evaluation.data.corpus import library_files

Part = Literal["calibrate", "tune", "report"]
PARTS: tuple[Part, ...] = get_args(Part)
MODULUS = 4
_PART_OF: tuple[Part, ...] = ("calibrate", "calibrate", "tune", "report")
"""By number modulo `MODULUS`."""
_MIN_SOURCE = 2000
"""Characters of the shortest source file that is a document."""


class DataError(ValueError):
    """A data set is missing or not in its form; the message says which and where it comes from."""


class _DataSet(NamedTuple):
    file: str
    fields: tuple[str, ...]
    origin: str


DATA_SETS: dict[str, _DataSet] = {
    "essays": _DataSet(
        "essays.jsonl.gz", ("text",), "github.com/gkamradt/LLMTest_NeedleInAHaystack"
    ),
    "gsm8k-test": _DataSet(
        "gsm8k-test.jsonl", ("question", "answer"), "github.com/openai/grade-school-math"
    ),
    "kv-retrieval": _DataSet(
        "kv-retrieval-75-keys.jsonl.gz",
        ("ordered_kv_records",),
        "github.com/nelson-liu/lost-in-the-middle",
    ),
    "nq-open": _DataSet(
        "nq-open-oracle.jsonl.gz",
        ("question", "answers", "ctxs"),
        "github.com/nelson-liu/lost-in-the-middle",
    ),
}
LIBRARY = "library"
"""Data set of Python sources. It is on every machine, so it is in no directory."""


@dataclass(frozen=True)
class Document:
    """One line of a data set, or one source file (field `text`). name: set and number."""

    name: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One part of the data sets in a directory."""

    directory: str
    part: Part

    def documents(self, name: str) -> Sequence[Document]:
        """Documents of this part of a data set, in the order of their numbers.

        name: in `DATA_SETS`, or `LIBRARY`. Raises DataError.
        """
        lines = _library() if name == LIBRARY else _lines(Path(self.directory), name)
        return [
            Document(f"{name} {number}", content)
            for number, content in enumerate(lines)
            if part_of(number) == self.part
        ]


def part_of(number: int) -> Part:
    """Part to which the document of this number belongs."""
    return _PART_OF[number % MODULUS]


@lru_cache(maxsize=8)
def _lines(directory: Path, name: str) -> tuple[dict[str, Any], ...]:
    about = DATA_SETS[name]
    path = directory / about.file
    fields = ", ".join(about.fields)
    if not path.is_file():
        raise DataError(
            f"--data {str(directory)!r} has no {about.file}: JSON lines with {fields}, "
            f"from {about.origin}"
        )
    data = path.read_bytes()
    try:
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = tuple(msgspec.json.decode(line) for line in text.splitlines() if line.strip())
    except (OSError, EOFError, msgspec.DecodeError) as error:
        raise DataError(f"{path} can't be read as JSON lines with {fields}: {error}") from None
    for number, line in enumerate(lines):
        missing = [f for f in about.fields if not isinstance(line, dict) or f not in line]
        if missing:
            raise DataError(f"{path} line {number + 1} has no {missing[0]}; lines need {fields}")
    return lines


@lru_cache(maxsize=1)
def _library() -> tuple[dict[str, Any], ...]:
    """Sources inside the standard library's packages; top-level modules are for calibration."""
    texts = (
        path.read_text(encoding="utf-8", errors="ignore")
        for name, path in library_files()
        if "/" in name
    )
    return tuple({"text": text} for text in texts if len(text) >= _MIN_SOURCE)
