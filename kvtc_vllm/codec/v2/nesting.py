"""Step plans that are nested: a blob of one can be made one of the next by halving its levels.

A plan is *nested* in one of half its step if its bins are unions of that plan's, levels 0 and 1
together, 2 and 3, and so on. `halved_offsets` makes it so; two plans tell it by their steps, which
a search would not find that exactly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

MAX_HALVINGS = 4
"""Plans that are nested one in the other, below the first."""
Levels = npt.NDArray[np.int32]


def halved_offsets(fine: StepPlan) -> torch.Tensor:
    """Offset of each column of a plan nested in `fine`, marked tokens' last: float32 [r].

    Without a dead zone besides. So level 1 begins where level 2 of `fine` does, to the last bit.
    """
    both = [fine] if fine.beyond is None else [fine, fine.beyond]
    return torch.cat([plan.rounding[plan.classes.long(), 1] for plan in both]) / 2


def is_nested(coarse: StepPlan, fine: StepPlan) -> bool:
    """Whether levels of `fine` halve to levels of `coarse`."""
    return coarse.step == 2 * fine.step and coarse.sink_gain == fine.sink_gain


def nested_ratios(artifact: RankArtifact) -> dict[float, float]:
    """Target ratio -> that of the plans nested in its own, where all sections have them."""
    found = {}
    for fine in artifact.ratios():
        for coarse in artifact.ratios():
            if all(
                is_nested(step_plan(section, coarse), step_plan(section, fine))
                for section in artifact.sections.values()
            ):
                found[fine] = coarse
    return found


def halved(levels: Levels) -> Levels:
    """Levels of the nested plan: half of each, towards 0."""
    # A shift alone would go down.
    return (levels + (levels < 0)) >> 1
