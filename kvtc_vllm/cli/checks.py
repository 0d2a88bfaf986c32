"""Lines of a check-up: printed as they come, or all together as JSON."""

from __future__ import annotations

import json

MARKS = {True: "ok  ", False: "BAD ", None: "info"}


class Checks:
    """healthy: whether nothing was bad so far."""

    def __init__(self, as_json: bool) -> None:
        self.healthy = True
        self._as_json = as_json
        self._lines: list[dict[str, object]] = []

    def add(self, good: bool | None, topic: str, text: str) -> None:
        """One line. good: None for what is neither good nor bad."""
        self.healthy &= good is not False
        self._lines.append({"check": topic, "good": good, "says": text})
        if not self._as_json:
            print(f"{MARKS[good]} {topic:11} {text}")

    def close(self, well: str, badly: str) -> int:
        """The verdict; returns the exit status."""
        verdict = well if self.healthy else badly
        if self._as_json:
            result = {"healthy": self.healthy, "verdict": verdict, "checks": self._lines}
            print(json.dumps(result, indent=1))
        else:
            print(verdict)
        return 0 if self.healthy else 1
