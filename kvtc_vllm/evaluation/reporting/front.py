"""Quality against bytes: which methods no other beats, and bytes at equal KL."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtc_vllm.evaluation.reporting.results import EXACT, RESAMPLES, Row

_OURS = re.compile(r"(kvtc2?)-[\d.]+x ?(.*)")


def curve_of(method: str) -> str | None:
    """The name that our methods of one kind share at all ratios; None for other methods.

    "kvtc-16x weighted" is of "kvtc weighted".
    """
    match = _OURS.fullmatch(method)
    return None if match is None else f"{match.group(1)} {match.group(2)}".strip()


def kl_rows(found: Iterable[Row], task: str, context: int) -> list[Row]:
    """KL over all examples of a task, a row per method that stores, by real ratio."""
    own = [
        row
        for row in found
        if (row.task, row.context, row.metric, row.label) == (task, context, "kl", "")
        and row.method != EXACT
        and row.real_ratio
    ]
    return sorted(own, key=lambda row: row.real_ratio)


def pareto_front(points: Sequence[Row]) -> list[Row]:
    """Those that no other equals or beats in ratio and in KL, by real ratio."""
    front: list[Row] = []
    for row in sorted(points, key=lambda row: (-row.real_ratio, row.value)):
        if not front or row.value < front[-1].value:
            front.append(row)
    return front[::-1]


@dataclass(frozen=True)
class Point:
    """A method on one task or on several: bytes, and KL by session (nats per token)."""

    method: str
    real_ratio: float
    sessions: np.ndarray
    """float64 [sessions], in the same order for all methods."""


def pooled(found: Iterable[Row], tasks: Sequence[tuple[str, int]]) -> list[Point]:
    """Methods that were measured on all of these tasks and contexts, with all of their sessions.

    The real ratio is that of all bytes together, if tasks store as much as each other. Methods
    without KL by session, or with fewer sessions than others, are left out.
    """
    rows = list(found)
    by_task = [{row.method: row for row in kl_rows(rows, *task)} for task in tasks]
    common = [name for name in by_task[0] if all(name in own for own in by_task)]
    points = [
        Point(
            name,
            len(tasks) / sum(1 / own[name].real_ratio for own in by_task),
            np.concatenate([np.asarray(own[name].by_session, dtype=float) for own in by_task]),
        )
        for name in common
        if all(own[name].by_session for own in by_task)
    ]
    most = max((len(point.sessions) for point in points), default=0)
    return sorted(
        (point for point in points if len(point.sessions) == most), key=lambda p: p.real_ratio
    )


@dataclass(frozen=True)
class Neighbour:
    """A method and the one with the next less KL. times: KL over its KL, with a 95 % interval."""

    method: str
    before: str
    kl: float
    times: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        """Whether the order of the two is beyond the interval."""
        return self.low > 1


def neighbours(points: Sequence[Point]) -> list[Neighbour]:
    """Methods by rising KL but the first. Sessions are drawn anew for both of a pair together.

    points: of the same sessions.
    """
    ordered = sorted(points, key=lambda point: float(point.sessions.mean()))
    generator = np.random.default_rng(0)
    found = []
    for before, point in itertools.pairwise(ordered):
        count = len(point.sessions)
        drawn = generator.integers(0, count, (RESAMPLES, count))
        less = np.maximum(before.sessions, 1e-12)
        times = point.sessions[drawn].mean(axis=1) / less[drawn].mean(axis=1)
        low, high = np.percentile(times, (2.5, 97.5))
        kl = float(point.sessions.mean())
        ratio = kl / float(less.mean())
        found.append(Neighbour(point.method, before.method, kl, ratio, float(low), float(high)))
    return found


@dataclass(frozen=True)
class Factor:
    """Bytes of a point over those of a curve at the same KL, with a 95 % interval.

    open_above: the curve has less KL than the point even at its highest ratio, so the factor is
    at least that large; open_below: more KL even at its lowest, so it is at most that large.
    """

    value: float
    low: float
    high: float
    open_above: bool
    open_below: bool


def equal_kl(point: Point, curve: Sequence[Point]) -> Factor:
    """How many times fewer bytes a curve stores at the KL of a point.

    Between measured ratios, log KL is taken as linear in log ratio. Sessions are drawn anew for
    point and curve together. Nothing is extrapolated.
    """
    ratios = np.log([own.real_ratio for own in curve])
    table = np.stack([own.sessions for own in curve])
    generator = np.random.default_rng(0)
    count = table.shape[1]
    drawn = generator.integers(0, count, (RESAMPLES, count))
    means, levels = table[:, drawn].mean(axis=-1), point.sessions[drawn].mean(axis=-1)
    found = [_ratio_at(level, ratios, kl) for level, kl in zip(levels, means.T, strict=True)]
    low, high = np.percentile(np.exp(found) / point.real_ratio, (2.5, 97.5))
    level, kl = float(point.sessions.mean()), table.mean(axis=1)
    value = float(np.exp(_ratio_at(level, ratios, kl))) / point.real_ratio
    return Factor(value, float(low), float(high), level > kl.max(), level < kl[0])


def _ratio_at(level: float, log_ratios: np.ndarray, kl: np.ndarray) -> float:
    """Log ratio at which the curve has this KL, within the measured ratios.

    Where KL falls as the ratio rises, which is chance, the larger KL before stays.
    """
    risen = np.maximum.accumulate(np.maximum(kl, 1e-12))
    return float(np.interp(np.log(max(level, 1e-12)), np.log(risen), log_ratios))
