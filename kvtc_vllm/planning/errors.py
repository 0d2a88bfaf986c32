"""The one exception of this part."""

from __future__ import annotations


class PlanError(Exception):
    """A model or figure that can't be planned with; one sentence."""
