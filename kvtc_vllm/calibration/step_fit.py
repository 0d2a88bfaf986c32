"""Fitting all sections of a rank for codec 2, whose plans share one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvtc_vllm.calibration.fit_settings import FitSettings, lowest_own_ratio
from kvtc_vllm.calibration.section_fit import (
    RowSource,
    SectionFit,
    SectionFitter,
    SectionProgress,
)
from kvtc_vllm.calibration.step_plans import CHUNK_TOKENS, make_step_plans
from kvtc_vllm.codec.artifact import KINDS, Geometry, SectionBasis, SectionKey
from kvtc_vllm.codec.container import container_bytes, section_bytes
from kvtc_vllm.codec.entropy import UNIT_BYTES, EntropyCoder, aligned
from kvtc_vllm.codec.marks import marks_length
from kvtc_vllm.codec.shuffle import shuffle
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan


def fit_steps(
    source: RowSource,
    geometry: Geometry,
    ratios: Sequence[float],
    sink_tokens: int,
    rule: SinkRule | None,
    settings: FitSettings,
    progress: SectionProgress | None,
) -> dict[SectionKey, tuple[SectionBasis, SectionFit]]:
    """Bases of every section first, then plans for all of them together, then held-out errors.

    rule: tells the sinks. Raises ArtifactError for a ratio that can't be met.
    """
    fitters = {}
    for key in geometry.section_keys(settings.section_names):
        lowest = lowest_own_ratio(geometry, *key, ratios, settings)
        fitters[key] = SectionFitter(source, geometry, *key, lowest, settings, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    index = sample_index(source, settings, generator)
    marks = sink_marks(source, geometry, index, rule)
    report = _reporter(progress)
    plans = make_step_plans(
        [fitter.sample(index) for fitter in fitters.values()],
        marks,
        ratios,
        overhead_bytes(source, geometry, sink_tokens, rule, ENTROPY),
        ENTROPY,
        settings.steps,
        report,
    )
    return {
        key: fitter.finish(own, _through)
        for (key, fitter), own in zip(fitters.items(), plans, strict=True)
    }


def sample_index(
    source: RowSource, settings: FitSettings, generator: torch.Generator
) -> torch.Tensor:
    """Numbers of training rows, int64 [n], in blocks of `CHUNK_TOKENS` neighbours drawn at random.

    Bytes are counted per block as per chunk, and a chunk's tokens are neighbours.
    """
    rows = source.select(heldout=False, limit=None, generator=None)
    blocks = list(rows.split(CHUNK_TOKENS))
    if len(blocks) > 1 and len(blocks[-1]) < CHUNK_TOKENS:
        blocks.pop()
    count = min(len(blocks), max(1, settings.simulation_rows // CHUNK_TOKENS))
    drawn = torch.randperm(len(blocks), generator=generator)[:count].sort().values
    return torch.cat([blocks[i] for i in drawn.tolist()])


def sink_marks(
    source: RowSource, geometry: Geometry, index: torch.Tensor, rule: SinkRule | None
) -> torch.Tensor:
    """The sinks among rows, chunk by chunk: bool [n]."""
    if rule is None:
        return torch.zeros(len(index), dtype=torch.bool)
    layers = geometry.num_layers
    parts = [
        rule.marks(source.cache_rows("v", part, 0, layers)) for part in index.split(CHUNK_TOKENS)
    ]
    return torch.cat(parts)


def overhead_bytes(
    source: RowSource,
    geometry: Geometry,
    sink_tokens: int,
    rule: SinkRule | None,
    entropy: EntropyCoder,
) -> float:
    """Bytes per token of a blob besides its coded sections.

    Header, checksum and marks of a chunk of `CHUNK_TOKENS`; and the exact sinks, which every
    document has once, divided by the mean length of the calibration documents.
    """
    fixed = container_bytes([])
    if rule is not None:
        fixed += section_bytes(aligned(marks_length(CHUNK_TOKENS)))
    taken = fixed / CHUNK_TOKENS
    if sink_tokens:
        index = source.select(heldout=False, limit=None, generator=None)[:sink_tokens]
        streams = [
            stream
            for kind in KINDS
            for stream in shuffle(source.cache_rows(kind, index, 0, geometry.num_layers))
        ]
        encoded = entropy.encode(streams)
        contents = UNIT_BYTES * len(encoded.units) + aligned(len(encoded.body))
        taken += section_bytes(contents) / document_length(source)
    return taken


def document_length(source: RowSource) -> float:
    """Mean number of tokens of the captured documents, told by their last position captured."""
    documents, number = source.docs.unique(return_inverse=True)
    last = torch.zeros(len(documents), dtype=source.positions.dtype)
    last = last.scatter_reduce(0, number, source.positions, "amax")
    return float((last + 1).double().mean())


def _through(coefficients: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    return plan.restore(plan.quantise(coefficients))


def _reporter(progress: SectionProgress | None) -> Callable[[str, int, int], None]:
    if progress is None:
        return lambda stage, done, total: None
    return lambda stage, done, total: progress("steps", stage, done, total)
