"""Prompts by length: a past that is stored once, and a new end in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as _pages

NEW_TOKENS = 64
"""At the end of a prompt, what its user has just typed; half a chunk."""
_LONG_PAGES = ("specialnames", "compound", "formatstrings", "string-methods", "debugger")


@dataclass(frozen=True)
class Prompt:
    """past: token ids that came before. ends: of every round, the new token ids."""

    past: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of a return."""
        return len(self.past) + len(self.ends[0])

    def of_round(self, number: int) -> list[int]:
        """The token ids of a return."""
        return [*self.past, *self.ends[number]]


def prompts(model: Path, lengths: Sequence[int], rounds: int) -> list[Prompt]:
    """One prompt per length, of pages of Python's language reference.

    model: directory with a tokenizer. Raises ValueError if the pages are too short for them.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n\n".join(_pages[name] for name in _LONG_PAGES)
    return cut(tokenizer.encode(text, verbose=False), lengths, rounds)


def cut(token_ids: Sequence[int], lengths: Sequence[int], rounds: int) -> list[Prompt]:
    """Prompts out of one text; no two begin alike, and no two ends of a prompt are the same place.

    Raises ValueError if the text is too short.
    """
    needed = sum(lengths) + len(lengths) * NEW_TOKENS * (rounds - 1)
    if len(token_ids) < needed:
        raise ValueError(f"the text has {len(token_ids)} tokens; these lengths need {needed}")
    rest = tuple(token_ids)
    found = []
    for length in lengths:
        past, rest = rest[: length - NEW_TOKENS], rest[length - NEW_TOKENS :]
        ends = tuple(rest[i * NEW_TOKENS : (i + 1) * NEW_TOKENS] for i in range(rounds))
        rest = rest[rounds * NEW_TOKENS :]
        found.append(Prompt(past, ends))
    return found
