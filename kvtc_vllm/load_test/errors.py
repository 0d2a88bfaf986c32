"""The one exception of this part."""

from __future__ import annotations


class LoadTestError(Exception):
    """A server, trace or setting that a load test can't work with; one sentence."""
