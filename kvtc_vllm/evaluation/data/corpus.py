"""Natural text for the reference model, taken from the Python installation itself.

Every machine that can run this project has CPython's standard library, so its
sources, its docstrings and the prose of `pydoc_data.topics` are a corpus that
needs no download. A fixed part of the files is held out by a hash of their name.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "eval"]

#: One document in this many is held out for evaluation.
HOLD_OUT_ONE_IN = 20
#: Folders that are not the library itself, or hold tables rather than text.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "__pycache__", "test", "tests", "encodings", "pydoc_data"}
)
_MIN_DOCSTRING = 80


def split_of(name: str) -> Split:
    """Say on which side of the hold-out the document called `name` lies."""
    digest = hashlib.sha256(name.encode()).digest()
    return "eval" if int.from_bytes(digest[:4], "big") % HOLD_OUT_ONE_IN == 0 else "train"


def library_files() -> list[tuple[str, Path]]:
    """Sources of the standard library by name, such as "email/message.py", sorted."""
    root = Path(sysconfig.get_paths().get("stdlib") or os.path.dirname(os.__file__))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if _SKIPPED_FOLDERS.isdisjoint(folders) and not any(
            f.startswith("config-") for f in folders
        ):
            found.append((relative.as_posix(), path))
    return found


def _docstrings(source: str) -> list[str]:
    """Docstrings of a module, its classes and functions, long enough to be prose."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in texts if text and len(text) >= _MIN_DOCSTRING]


@lru_cache(maxsize=2)
def code_documents(split: Split) -> tuple[str, ...]:
    """Standard library source files of one split, one string per file."""
    return tuple(
        text
        for name, path in library_files()
        if split_of(name) == split
        and len(text := path.read_text(encoding="utf-8", errors="ignore")) > 200
    )


@lru_cache(maxsize=2)
def prose_documents(split: Split) -> tuple[str, ...]:
    """`pydoc` topics and module docstrings of one split.

    The docstrings of one file are joined to one document: alone most are short.
    A file is on the same side here as in `code_documents`, so evaluation prose
    never occurs inside training code.
    """
    from pydoc_data import topics  # only prose needs these 460 kB

    documents = [
        text.replace("*Note*", "Note")
        for name, text in sorted(topics.topics.items())
        if split_of(f"topics/{name}") == split
    ]
    for name, path in library_files():
        if split_of(name) != split:
            continue
        texts = _docstrings(path.read_text(encoding="utf-8", errors="ignore"))
        if texts:
            documents.append("\n\n".join(texts))
    return tuple(documents)


@lru_cache(maxsize=2)
def paragraphs(split: Split) -> tuple[str, ...]:
    """Paragraphs of the prose that read as sentences: filler for the tasks."""
    kept = []
    for document in prose_documents(split):
        for block in document.split("\n\n"):
            text = " ".join(block.split())
            letters = sum(c.isalpha() or c == " " for c in text)
            plain = 60 <= len(text) <= 600 and letters > 0.92 * len(text)
            if plain and text[0].isupper() and text.endswith("."):
                kept.append(text)
    return tuple(dict.fromkeys(kept))
