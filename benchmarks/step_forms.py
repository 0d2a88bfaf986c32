"""Codec 2's coefficients in forms that can be made smaller: native, nested, in parts of columns.

For `benchmarks.step_layers`. Bytes are those of coded sections in blobs, entries and units
included. See there what the forms are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.sensitivity import CHUNK
from benchmarks.sensitivity_texts import SCORED
from benchmarks.step_nested import Cells, Values, layer_bytes, refine
from kvtc_vllm.calibration.cache_replay import Prefix, kl, score
from kvtc_vllm.codec.artifact import RankArtifact, SectionKey
from kvtc_vllm.codec.container import section_bytes
from kvtc_vllm.codec.entropy import UNIT_BYTES, aligned
from kvtc_vllm.codec.transform import (
    chunk_rows,
    from_coefficients,
    rows_to_cache,
    to_coefficients,
)
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.codes import encode_codes
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

Coefficients = dict[SectionKey, torch.Tensor]
"""Of every section float32 [r, T], those of marked tokens times their gain."""


@dataclass(frozen=True)
class Document:
    """coded: tokens that are not exact. overhead: bytes of all blobs besides coded sections."""

    prefix: Prefix
    x: Coefficients
    marks: torch.Tensor
    spans: list[slice]


@dataclass(frozen=True)
class Stored:
    """Bytes of coded sections, and what they hold."""

    taken: int
    values: Coefficients


class Bench:
    """One artifact and the documents that it is tried on."""

    def __init__(self, artifact: RankArtifact, model: Any, prefixes: Sequence[Prefix]) -> None:
        self.artifact = artifact
        self.model = model
        self.documents = [self._document(prefix) for prefix in prefixes]
        self.raw = sum(p.k.nbytes + p.v.nbytes for p in prefixes)

    def _document(self, prefix: Prefix) -> Document:
        artifact, sinks = self.artifact, self.artifact.sink_tokens
        k, v = prefix.k[sinks:], prefix.v[sinks:]
        ends = [*range(CHUNK, len(prefix.k), CHUNK), len(prefix.k)]
        spans = [
            slice(max(0, end - CHUNK - sinks), end - sinks)
            for end in (e for e in ends if e > sinks)
        ]
        assert artifact.sink_rule is not None
        marks = torch.cat([artifact.sink_rule.marks(v[span]) for span in spans])
        positions = torch.arange(sinks, len(prefix.k))
        x = {}
        for key, section in artifact.sections.items():
            rows = chunk_rows(k, v, *key, artifact, positions)
            found = to_coefficients(rows, section, section.rank)
            found[marks] *= next(iter(section.plans.values())).sink_gain
            x[key] = found.T.contiguous()
        return Document(prefix, x, marks, spans)

    def plans(self, ratio: float) -> dict[SectionKey, StepPlan]:
        """Of every section."""
        return {key: step_plan(s, ratio) for key, s in self.artifact.sections.items()}

    def kl(self, document: Document, values: Coefficients) -> float:
        """Of predictions on a cache of these coefficients."""
        artifact, sinks = self.artifact, self.artifact.sink_tokens
        k, v = document.prefix.k.clone(), document.prefix.v.clone()
        positions = torch.arange(sinks, len(k))
        for (group, name), section in artifact.sections.items():
            own = values[group, name].T.clone()
            own[document.marks] /= next(iter(section.plans.values())).sink_gain
            rows = from_coefficients(own, section)
            first, end = artifact.geometry.layer_groups[group]
            for tensor, part in artifact.geometry.row_parts(group, name).items():
                cache = rows_to_cache(rows[:, part], group, tensor, artifact, positions, k.dtype)
                (k if tensor == "k" else v)[sinks:, first:end] = cache
        return self.kl_of_cache(document, k, v)

    def kl_of_cache(self, document: Document, k: torch.Tensor, v: torch.Tensor) -> float:
        """Of predictions on a cache."""
        prefix = document.prefix
        return kl(prefix.exact, score(self.model, prefix.ids, k, v, SCORED))


def quantised(x: Coefficients, plans: dict[SectionKey, StepPlan], document: Document) -> Stored:
    """By step plans, as codec 2 does."""
    taken, values = 0, {}
    for key, plan in plans.items():
        rows, out = x[key].T, torch.zeros_like(x[key])
        codes = plan.quantise(rows)
        out[: plan.rank] = plan.restore(codes).T
        for span in document.spans:
            taken += section_bytes(_units(codes[:, span], plan)) + section_bytes(0)
        if plan.beyond is not None and bool(document.marks.any()):
            own = rows[document.marks, plan.rank : plan.total_rank]
            codes = plan.beyond.quantise(own)
            out[plan.rank : plan.total_rank, document.marks] = plan.beyond.restore(codes).T
            for span in document.spans:
                before = int(document.marks[: span.start].sum())
                marked = int(document.marks[span].sum())
                taken += _units(codes[:, before : before + marked], plan.beyond) if marked else 0
        values[key] = out
    return Stored(taken, values)


def _units(codes: torch.Tensor, plan: StepPlan) -> int:
    encoded = ENTROPY.encode(encode_codes(codes, plan.packed))
    return UNIT_BYTES * len(encoded.units) + aligned(len(encoded.body))


def fit_values(
    training: Coefficients, marks: torch.Tensor, levels: Sequence[dict[SectionKey, StepPlan]]
) -> list[dict[SectionKey, Values]]:
    """Of nested bins, by level and section."""
    cells = {key: Cells(x) for key, x in training.items()}
    fitted = []
    for plans in levels:
        for key, plan in plans.items():
            refine(cells[key], plan, marks)
        fitted.append({key: Values.fit(cells[key], plan) for key, plan in plans.items()})
    return fitted


def nested(
    document: Document,
    levels: Sequence[dict[SectionKey, StepPlan]],
    fitted: Sequence[dict[SectionKey, Values]],
) -> list[Stored]:
    """What all layers up to each level take and hold, lowest level first."""
    cells = {key: Cells(x) for key, x in document.x.items()}
    found, taken = [], 0
    for plans, values in zip(levels, fitted, strict=True):
        held = {}
        for key, plan in plans.items():
            symbols = refine(cells[key], plan, document.marks)
            taken += layer_bytes(symbols, plan, document.marks, ENTROPY, document.spans)
            held[key] = values[key].restore(cells[key], plan)
        found.append(Stored(taken, held))
    return found


def in_parts(
    document: Document, plans: dict[SectionKey, StepPlan], cuts: Sequence[dict[SectionKey, int]]
) -> list[Stored]:
    """The top level's columns in parts, by rising number, smallest first. cuts: columns up to the
    end of each part. Marked tokens have all of theirs in the first."""
    whole = quantised(document.x, plans, document)
    found, taken = [], 0
    before = dict.fromkeys(plans, 0)
    for cut in cuts:
        held = {}
        for key, plan in plans.items():
            part = replace(plan, classes=plan.classes[before[key] : cut[key]], beyond=None)
            rows = document.x[key].T[:, before[key] : cut[key]]
            codes = part.quantise(rows)
            for span in document.spans:
                taken += section_bytes(_units(codes[:, span], part))
            value = whole.values[key].clone()
            value[cut[key] :, ~document.marks] = 0
            held[key] = value
            if not before[key]:
                taken += _sinks_alone(document, key, plan, cut[key])
        found.append(Stored(taken, held))
        before = cut
    return found


def _sinks_alone(document: Document, key: SectionKey, plan: StepPlan, first: int) -> int:
    """Bytes of what marked tokens have in columns from `first` on, those beyond included."""
    taken = 0
    for span in document.spans:
        marked = document.marks[span]
        taken += section_bytes(0)
        if not bool(marked.any()):
            continue
        rows = document.x[key].T[span][marked]
        left = replace(plan, classes=plan.classes[first:], beyond=None)
        taken += _units(left.quantise(rows[:, first : plan.rank]), left)
        if plan.beyond is not None:
            own = rows[:, plan.rank : plan.total_rank]
            taken += _units(plan.beyond.quantise(own), plan.beyond)
    return taken


def cuts_for(
    bench: Bench, plans: dict[SectionKey, StepPlan], training: Coefficients, targets: Sequence[int]
) -> list[dict[SectionKey, int]]:
    """Columns of every section, those of more than some deviation, that take these bytes; all
    last."""
    deviations = {key: x.square().mean(1).sqrt() for key, x in training.items()}

    def cut(least: float) -> dict[SectionKey, int]:
        counts = {key: int((deviations[key][: p.rank] >= least).sum()) for key, p in plans.items()}
        return {key: max(1, count) for key, count in counts.items()}

    found = []
    for target in targets:
        low, high = 1e-3, 1e3
        for _ in range(9):
            middle = math.sqrt(low * high)
            taken = sum(in_parts(d, plans, [cut(middle)])[0].taken for d in bench.documents)
            low, high = (middle, high) if taken > target else (low, middle)
        found.append(cut(high))
    return [*found, {key: plan.rank for key, plan in plans.items()}]
