"""Hypothesis without a deadline: a shared machine's pauses are not failures."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
