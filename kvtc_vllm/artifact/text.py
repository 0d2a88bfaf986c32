"""Text that somebody else wrote, on the way to a terminal or a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control, formatting and separating characters as escapes, except spaces.

    So it can neither steer a terminal nor pass for another line.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
