"""From records to rows: means, paired differences, confidence intervals, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec
import numpy as np

from kvtc_vllm.evaluation.job import Outcome, Record, StoredBytes

RESAMPLES = 2000
EXACT = "exact"
"""Method name of the run without any reload."""

SECONDS = "seconds"
"""Metric: processor seconds that a method's replays of a task took, or its exact runs."""

MAX_KL = 0.02
"""Nats per token of divergence from the exact run above which a task counts as damaged."""
MAX_ACCURACY_DROP = 0.1
"""Share of answers lost above which a task counts as damaged."""

MIN_EXACT_ACCURACY = 0.3
"""Share of answers that the exact run must get right, or accuracy says nothing of a method."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure."""

    task: str
    method: str
    plan: str
    real_ratio: float
    """Bytes of the KV in the cache's dtype over bytes stored for it."""
    context: int
    label: str
    """Depth, turn, ...; "" for all examples of a task and context."""
    metric: str
    value: float
    ci95: tuple[float, float]
    """Interval of a bootstrap over sessions."""
    n: int
    """Examples."""
    read_ratio: float = 0.0
    """Bytes of the KV over bytes that one query reads, where that is not all that is stored."""
    by_session: list[float] = []
    """Of KL over all examples, the value of each session in order: methods over the same sessions
    can be compared in pairs."""


@dataclass(frozen=True)
class _Metric:
    """Sums over examples: value = numerator / denominator."""

    name: str
    parts: Callable[[Record], tuple[float, float]]
    answers_only: bool = False
    keep_sessions: bool = False


_EXACT_METRICS = (
    _Metric("nll", lambda r: (r.nll_exact, r.target_tokens)),
    _Metric("accuracy", lambda r: (r.correct_exact, 1), answers_only=True),
)
_METRICS = (
    _Metric("nll", lambda r: (r.nll, r.target_tokens)),
    _Metric("nll_change", lambda r: (r.nll - r.nll_exact, r.target_tokens)),
    _Metric("kl", lambda r: (r.kl, r.target_tokens), keep_sessions=True),
    _Metric("top1_agreement", lambda r: (r.agreed, r.target_tokens)),
    _Metric("accuracy", lambda r: (r.correct, 1), answers_only=True),
    _Metric("accuracy_change", lambda r: (r.correct - r.correct_exact, 1), answers_only=True),
    _Metric("reloaded_share", lambda r: (r.reloaded_tokens, r.prompt_tokens)),
)


def rows(outcome: Outcome) -> list[Row]:
    """All figures of one method."""
    method = outcome.method
    return [
        row
        for stored in outcome.stored
        for row in _with_seconds(
            _rows(outcome, stored, method.name, method.plan, ratio(stored), _METRICS),
            stored.seconds,
        )
    ]


def exact_rows(outcome: Outcome) -> list[Row]:
    """The figures of the exact runs that this outcome was compared with."""
    return [
        row
        for stored in outcome.stored
        for row in _with_seconds(
            _rows(outcome, stored, EXACT, "recomputed", 1.0, _EXACT_METRICS),
            stored.exact_seconds,
        )
    ]


def _with_seconds(found: Iterable[Row], seconds: float) -> Iterable[Row]:
    """Figures of one method on one task, of which the first is of all examples, and its seconds."""
    own = list(found)
    yield from own
    if own and seconds:
        value = round(seconds, 2)
        yield msgspec.structs.replace(
            own[0], metric=SECONDS, value=value, ci95=(value, value), by_session=[]
        )


def ratio(stored: StoredBytes) -> float:
    """Real compression ratio; 0 if nothing was stored."""
    return stored.raw / stored.stored if stored.stored else 0.0


def damaged(found: Iterable[Row]) -> dict[tuple[str, int], str]:
    """Tasks and contexts at which one method does damage beyond doubt, with the reason.

    Beyond doubt: the whole confidence interval lies past the limit.
    """
    reasons: dict[tuple[str, int], str] = {}
    for row in found:
        if row.label:
            continue
        if row.metric == "kl" and row.ci95[0] > MAX_KL:
            reasons[row.task, row.context] = f"KL {row.value:.3f} nats a token"
        if row.metric == "accuracy_change" and row.ci95[1] < -MAX_ACCURACY_DROP:
            reasons[row.task, row.context] = f"accuracy {row.value:+.0%}"
    return reasons


def unanswered(found: Iterable[Row]) -> dict[tuple[str, int], float]:
    """Tasks and contexts whose accuracy says nothing, with the exact run's share of answers."""
    return {
        (row.task, row.context): row.value
        for row in found
        if row.method == EXACT
        and row.metric == "accuracy"
        and not row.label
        and row.value < MIN_EXACT_ACCURACY
    }


def _rows(
    outcome: Outcome,
    stored: StoredBytes,
    method: str,
    plan: str,
    real_ratio: float,
    metrics: Sequence[_Metric],
) -> Iterable[Row]:
    records = [r for r in outcome.records if (r.task, r.context) == (stored.task, stored.context)]
    by_label = sorted((r for r in records if r.label), key=lambda r: r.label)
    parts = [("", records)]
    parts += [(label, list(group)) for label, group in groupby(by_label, key=lambda r: r.label)]
    for label, part in parts:
        for metric in metrics:
            chosen = [r for r in part if r.is_answer or not metric.answers_only]
            if not chosen:
                continue
            table = _by_session(chosen, metric)
            value, interval = _estimate(table)
            keep = metric.keep_sessions and not label
            yield Row(
                task=stored.task,
                method=method,
                plan=plan,
                real_ratio=round(real_ratio, 3),
                read_ratio=round(stored.raw / stored.read, 3)
                if method != EXACT and stored.read
                else 0.0,
                context=stored.context,
                label=label,
                metric=metric.name,
                value=value,
                ci95=interval,
                n=len(chosen),
                by_session=[float(f"{a / b:.6g}") for a, b in table] if keep else [],
            )


def _by_session(records: Sequence[Record], metric: _Metric) -> np.ndarray:
    """float64 [sessions, 2], in order of their numbers: sums of numerator and denominator."""
    sums: dict[int, np.ndarray] = {}
    for record in sorted(records, key=lambda r: r.session):
        sums.setdefault(record.session, np.zeros(2))
        sums[record.session] += np.asarray(metric.parts(record), dtype=float)
    return np.stack(list(sums.values()))


def _estimate(table: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Ratio of sums, and the percentile bootstrap over sessions, which are independent."""
    value = table[:, 0].sum() / table[:, 1].sum()
    if len(table) == 1:
        return float(value), (float("-inf"), float("inf"))
    generator = np.random.default_rng(0)
    drawn = table[generator.integers(0, len(table), (RESAMPLES, len(table)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return float(value), (float(low), float(high))
