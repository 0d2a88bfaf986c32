"""The demo's conversations: a page of Python's language reference and questions about it.

The pages come with every Python, as what `help("assignment")` prints. They are English prose with
some grammar. No artifact of the demo was calibrated on them, and nothing was tuned on them; what
it is calibrated on is in `calibration_text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics as _pages

SYSTEM = "You answer questions about a text. Your answers are short and use the words of the text."
FIRST_QUESTION = "What is this text about? Answer in one sentence."


@dataclass(frozen=True)
class Topic:
    """page: a key of `pydoc_data.topics`. characters: of it to use. terms: named things in it."""

    page: str
    characters: int
    terms: tuple[str, ...]


TOPICS = (
    Topic("assignment", 9600, ("augmented assignment", "slicing", "the target list")),
    Topic("comparisons", 9800, ("membership", "identity", "NaN")),
    Topic("strings", 9000, ("escape sequences", "bytes literals", "triple-quoted literals")),
    Topic("import", 8700, ("ImportError", "relative imports", "__future__")),
    Topic("calls", 6900, ("keyword arguments", "TypeError", "positional arguments")),
    Topic("customization", 13000, ("__new__", "__repr__", "__hash__")),
    Topic("typesmapping", 11800, ("popitem", "setdefault", "dictionary view objects")),
    Topic("try", 7700, ("finally", "ExceptionGroup", "handlers")),
    Topic("execmodel", 9400, ("global", "nonlocal", "NameError")),
    Topic("attribute-access", 13400, ("__getattr__", "descriptors", "__slots__")),
)
MOST_CHATS = len(TOPICS)
FEWEST_TURNS, MOST_TURNS = 2, 1 + len(TOPICS[0].terms)


def page(topic: Topic) -> str:
    """The start of a topic's page, cut after a paragraph."""
    text = _pages[topic.page].strip()
    if len(text) <= topic.characters:
        return text
    return text[: text.rindex("\n\n", 0, topic.characters)]


def chats(count: int, turns: int) -> list[list[str]]:
    """What the user says in each conversation, turn by turn.

    count: 1 to `MOST_CHATS`. turns: `FEWEST_TURNS` to `MOST_TURNS`. Raises ValueError for others.
    """
    if not 1 <= count <= MOST_CHATS:
        raise ValueError(f"--chats {count}: give a number from 1 to {MOST_CHATS}")
    if not FEWEST_TURNS <= turns <= MOST_TURNS:
        raise ValueError(f"--turns {turns}: give a number from {FEWEST_TURNS} to {MOST_TURNS}")
    return [_chat(topic)[:turns] for topic in TOPICS[:count]]


def opening(text: str, question: str) -> str:
    """The first message of a user who brings a text."""
    return f"Read this text.\n\n{text}\n\n{question}"


def _chat(topic: Topic) -> list[str]:
    return [
        opening(page(topic), FIRST_QUESTION),
        *(f"What does the text say about {term}? Answer in one sentence." for term in topic.terms),
    ]
