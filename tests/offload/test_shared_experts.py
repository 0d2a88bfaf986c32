"""Names where data-parallel engines hold experts of each other. Two threads stand for engines."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.weights import WeightsWatch
from tests.offload.two_ranks import Meeting, at_once


def names_of(experts: tuple[float, float], ranks: bool = False) -> list[bytes]:
    """Namespaces of both engines at their start. experts: the weights that each holds. ranks: the
    engines have several ranks, of which this is one."""
    found: dict[int, bytes] = {}
    meeting = Meeting()

    def start(engine: int) -> None:
        model = nn.ModuleDict({"attention": nn.Linear(8, 8), "experts": nn.Linear(8, 8)})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
            model["experts"].weight.fill_(experts[engine])
        names = Names(
            [],
            weights=WeightsWatch([model]),
            gather=(lambda own: [own, own]) if ranks else None,
            engines=partial(meeting, engine),
        )
        assert not names.rename(b"")
        found[engine] = names._identity
        # What engines do from then on they don't do together.
        if engine == 0:
            names.rename(b"a reset of its own")

    assert at_once(start) == [None, None]
    return [found[0], found[1]]


@pytest.mark.parametrize("ranks", [False, True])
def test_a_name_is_of_the_experts_of_all_engines(ranks: bool) -> None:
    before = names_of((1.0, 2.0), ranks)
    assert names_of((1.0, 2.0), ranks) == before
    for one, other in zip(names_of((1.0, 3.0), ranks), before, strict=True):
        assert one != other
    # What each holds is part of its name, so engines don't take each other's places.
    assert before[0] != before[1]
