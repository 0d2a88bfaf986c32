"""What the demo's artifact is calibrated on: chats about docstrings of the standard library.

Docstrings lie in the modules; the pages that the demo asks about lie in `pydoc_data`, which is
left out. Questions and answers are others too: an answer is the first paragraph of a docstring.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.demo.documents import SYSTEM, opening

MOST_CHARACTERS = 11_000
"""Of one text, some 2,800 tokens: as long as those of the demo."""
LEAST_CHARACTERS = 1_500
MOST_QUESTIONS = 4
_LONG_ENOUGH = 120
"""Characters of a docstring worth a question."""

Chat = list[dict[str, str]]


def write(path: Path, characters: int) -> None:
    """Write chats of at least `characters` in all to `path`, JSON lines of `kvtc calibrate`.

    Raises ValueError if the standard library here has fewer.
    """
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for chat in chats(Path(sysconfig.get_path("stdlib"))):
            file.write(json.dumps({"messages": chat}) + "\n")
            written += sum(len(message["content"]) for message in chat)
            if written >= characters:
                return
    raise ValueError(
        f"the docstrings of the standard library have {written} characters; {characters} are "
        "needed. Is it installed without sources, or does PYTHONOPTIMIZE remove them?"
    )


def chats(library: Path) -> Iterator[Chat]:
    """One chat per text of some length, modules in an order that mixes their subjects.

    library: a directory of Python sources, of which those at its top are read.
    """
    modules = [path for path in library.glob("*.py") if not path.name.startswith("_")]
    for path in sorted(modules, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        for part in _parts(_docstrings(path)):
            yield _chat(part)


def _docstrings(path: Path) -> list[tuple[str, str]]:
    """Names and docstrings of a module, its classes and functions, in their order."""
    module = ast.parse(path.read_bytes())
    nodes = ast.walk(module)
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [(node.name, ast.get_docstring(node)) for node in nodes if isinstance(node, named)]
    texts.insert(0, (f"the module {path.stem}", ast.get_docstring(module)))
    return [(name, text) for name, text in texts if text]


def _parts(docstrings: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    part: list[tuple[str, str]] = []
    size = 0
    for name, text in docstrings:
        text = text[:MOST_CHARACTERS]
        if size + len(text) > MOST_CHARACTERS:
            yield part
            part, size = [], 0
        part.append((name, text))
        size += len(text)
    if size >= LEAST_CHARACTERS:
        yield part


def _chat(part: list[tuple[str, str]]) -> Chat:
    text = "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in part)
    asked = [entry for entry in part if len(entry[1]) >= _LONG_ENOUGH][-MOST_QUESTIONS:]
    chat: Chat = [{"role": "system", "content": SYSTEM}]
    for name, docstring in asked or part[:1]:
        question = f"What is {name} for?"
        content = opening(text, question) if len(chat) == 1 else question
        chat.append({"role": "user", "content": content})
        answer = re.sub(r"\s+", " ", docstring.split("\n\n")[0])
        chat.append({"role": "assistant", "content": answer})
    return chat
