"""A place in memory, as the reliability tests have it."""

from tests.reliability.conftest import scratch

__all__ = ["scratch"]
