"""Results that earlier runs left, and what is measured now, in one report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

MUST_AGREE = ("model", "seed", "versions")
"""Of `about`: figures of different ones don't belong into one table."""
SAME_EXACT_RELATIVE, SAME_EXACT_NATS = 0.01, 0.005
"""Differences up to which two exact runs can be of the same prompts: rounding."""
_DOCUMENTS = re.compile(r"(?P<about>.*?reports): (?P<lists>.*)")


class Earlier:
    """Results in a directory, to which figures are added. It may hold none yet.

    Raises ValueError if the directory's results are unreadable, or of something else than
    `about` says.
    """

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        path = directory / "results.json"
        self._about: dict[str, Any] = {}
        self._rows: list[Row] = []
        if not path.exists():
            return
        try:
            self._rows = report.read(path)
            self._about = msgspec.json.decode(path.read_bytes())["about"]
        except (KeyError, msgspec.MsgspecError) as error:
            raise ValueError(f"--add: {path} can't be read as results: {error}") from error
        for key in MUST_AGREE:
            if self._about.get(key) != about[key]:
                raise ValueError(
                    f"--add: {path} has figures of {key} {self._about.get(key)}, these would be "
                    f"of {about[key]}; give another --out"
                )

    def joined(
        self, about: dict[str, Any], found: Sequence[Row]
    ) -> tuple[dict[str, Any], list[Row]]:
        """Both, as for a report. A figure measured again replaces the earlier one.

        Where the exact runs of a task differ, the prompts were others: earlier figures of that
        task and context are then dropped, since they can't be compared.
        """
        measured = {(row.task, row.context, row.method) for row in found if row.method != EXACT}
        exact = {_key(row): row for row in found if row.method == EXACT}
        before = {_key(row): row for row in self._rows if row.method == EXACT}
        other = {
            key[:2] for key, row in exact.items() if key in before and _differ(row, before[key])
        }
        kept = [
            row
            for row in self._rows
            if (row.task, row.context) not in other
            and (row.task, row.context, row.method) not in measured
        ]
        known = {_key(row) for row in kept if row.method == EXACT}
        new = [row for row in found if row.method != EXACT or _key(row) not in known]
        return self._joined_about(about), [*kept, *new]

    def _joined_about(self, about: dict[str, Any]) -> dict[str, Any]:
        commands = dict.fromkeys(
            [*filter(None, self._about.get("command", "").split("; ")), about["command"]]
        )
        joined = {**self._about, **about, "command": "; ".join(commands)}
        if "documents" in self._about and "documents" in about:
            joined["documents"] = _joined_documents(self._about["documents"], about["documents"])
        if "seconds" in about:
            joined["seconds"] = {**self._about.get("seconds", {}), **about["seconds"]}
        if "warnings" in about:
            warnings = [*self._about.get("warnings", ()), *about["warnings"]]
            joined["warnings"] = list(dict.fromkeys(warnings))
        return joined


def _key(row: Row) -> tuple[str, int, str, str]:
    return row.task, row.context, row.label, row.metric


def _differ(row: Row, before: Row) -> bool:
    if row.n != before.n:
        return True
    rounding = SAME_EXACT_NATS + SAME_EXACT_RELATIVE * abs(before.value)
    return row.metric == "nll" and abs(row.value - before.value) > rounding


def _joined_documents(before: str, now: str) -> str:
    """Two texts of `describe_documents`, with the numbers of both."""
    parts = [_DOCUMENTS.fullmatch(text) for text in (before, now)]
    if before == now or not all(parts):
        return now
    numbers: dict[str, set[int]] = {}
    for part in parts:
        assert part is not None
        for data_set in part["lists"].split("; "):
            name, _, own = data_set.partition(" ")
            numbers.setdefault(name, set()).update(map(int, own.split(", ")))
    lists = [f"{name} {', '.join(map(str, sorted(own)))}" for name, own in sorted(numbers.items())]
    assert parts[1] is not None
    return f"{parts[1]['about']}: {'; '.join(lists)}"
