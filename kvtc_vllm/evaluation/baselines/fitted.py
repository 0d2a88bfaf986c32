"""Baselines that need statistics of the model, made once before they store anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.statistics import ModelStatistics


class FittedBaseline(Baseline):
    """statistics: of the model, or the path of a file of them. Not charged, as KVTC's basis is not.

    Raises ValueError if they are of another shape.
    """

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        ropes: Sequence[Rope | None] = (),
        *,
        statistics: ModelStatistics | str,
        **given: float,
    ) -> None:
        # A path, because the options of a run are JSON.
        if isinstance(statistics, str):
            statistics = ModelStatistics.load(Path(statistics))
        statistics.check(geometry)
        self.statistics = statistics
        super().__init__(geometry, dtype, ropes, **given)
