"""Calibration text: files and data sets -> documents of token ids.

Accepts plain text (any other extension), JSON lines with a "text" field or a
chat under "messages", directories of these, and Hugging Face data sets as
`hf:NAME[:CONFIG]:SPLIT:COLUMN`. Long documents are cut into pieces of mixed
lengths, as the paper mixes 1K to 32K tokens; short ones are joined.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIN_PIECE = 256
"""Pieces shorter than this are joined with their neighbours: few tokens, mostly near sinks."""

CHARS_PER_TOKEN = 8
"""More than any tokeniser makes of ordinary text, so enough is read to fill the token count."""

Tokenize = Callable[[str], list[int]]
Text = str | list[dict[str, str]]
"""Plain text, or the messages of a chat."""


class DataError(ValueError):
    """Calibration data cannot be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Document:
    """One prompt to run. doc: its number. heldout: kept from the fit."""

    doc: int
    token_ids: list[int]
    heldout: bool


def read_texts(sources: Sequence[str], total_tokens: int) -> list[Text]:
    """Enough text for `total_tokens`, sources in order. Raises DataError.

    Read before a model is loaded, so that a bad file costs nothing.
    """
    texts: list[Text] = []
    chars = 0
    for text in _iterate(sources):
        texts.append(text)
        chars += len(text) if isinstance(text, str) else sum(len(m["content"]) for m in text)
        if chars >= CHARS_PER_TOKEN * total_tokens:
            break
    return texts


def _iterate(sources: Sequence[str]) -> Iterator[Text]:
    for source in sources:
        if source.startswith("hf:"):
            yield from _read_dataset(source)
            continue
        path = Path(source)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
            if not files:
                raise DataError(f"--data {source}: the directory holds no files")
        elif path.is_file():
            files = [path]
        else:
            raise DataError(f"--data {source}: no such file or directory")
        for file in files:
            yield from _read_file(file)


def make_documents(
    texts: Iterable[str],
    tokenize: Tokenize,
    *,
    max_tokens: int,
    total_tokens: int,
    heldout_fraction: float,
    seed: int,
) -> list[Document]:
    """Documents of at most `max_tokens` tokens each, about `total_tokens` in all.

    Every n-th document is held out, n = 1 / heldout_fraction, so that held-out rows
    come from documents that the fit never saw. Raises DataError if there is not
    enough text for at least one document of each sort.
    """
    rng = random.Random(seed)
    pieces: list[list[int]] = []
    collected, pending = 0, list[int]()
    wanted = _piece_length(rng, max_tokens)
    for text in texts:
        pending += tokenize(text)
        while len(pending) >= wanted and collected < total_tokens:
            pieces.append(pending[:wanted])
            collected += wanted
            pending = pending[wanted:]
            wanted = _piece_length(rng, max_tokens)
        if collected >= total_tokens:
            break
    if collected < total_tokens and len(pending) >= min(MIN_PIECE, max_tokens):
        pieces.append(pending[:max_tokens])
    every = max(2, round(1 / heldout_fraction))
    if len(pieces) < 2:
        raise DataError(
            f"--data holds {sum(map(len, pieces))} tokens in {len(pieces)} document(s); "
            f"at least two documents of {min(MIN_PIECE, max_tokens)} tokens are needed"
        )
    heldout = set(range(every - 1, len(pieces), every)) or {len(pieces) - 1}
    return [Document(i, piece, i in heldout) for i, piece in enumerate(pieces)]


def _piece_length(rng: random.Random, max_tokens: int) -> int:
    """Half short, half long, as the paper: up to a quarter of the limit, or up to all of it."""
    shortest = min(MIN_PIECE, max_tokens)
    quarter = max(shortest, max_tokens // 4)
    low, high = (shortest, quarter) if rng.random() < 0.5 else (quarter, max_tokens)
    return rng.randint(low, high)


def _hidden(path: Path, root: Path) -> bool:
    """Version control, caches and the like inside a data directory."""
    return any(
        p.startswith((".", "__")) and p != "__init__.py" for p in path.relative_to(root).parts
    )


def _read_file(path: Path) -> Iterator[Text]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: not readable as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        if content.strip():
            yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield _record_text(path, number, line)


def _record_text(path: Path, number: int, line: str) -> Text:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"--data {path}, line {number}: not JSON: {error}") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages
    ):
        return messages
    raise DataError(
        f'--data {path}, line {number}: needs a "text" string or a "messages" list of'
        " {role, content}"
    )


def _read_dataset(source: str) -> Iterator[str]:
    parts = source.removeprefix("hf:").split(":")
    if len(parts) not in (3, 4):
        raise DataError(f"--data {source}: give hf:NAME[:CONFIG]:SPLIT:COLUMN")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'--data {source}: needs the package "datasets"; pip install datasets'
        ) from error
    name, config = parts[0], parts[1] if len(parts) == 4 else None
    split, column = parts[-2], parts[-1]
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for row in rows:
            yield str(row[column])
    except Exception as error:
        raise DataError(f"--data {source}: {error}") from error
