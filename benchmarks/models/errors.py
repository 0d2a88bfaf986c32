"""What can go wrong while a model is made."""

from __future__ import annotations


class ModelError(Exception):
    """A model could not be had; the text is one line that says why and what would help."""
