"""Sinks found in rows that have some, and none found in rows that have none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kvtc_vllm.calibration.sinks import FIRST_POSITIONS, fit_sinks
from kvtc_vllm.codec.artifact import Geometry, Kind

LAYERS, HEADS, SIZE = 6, 2, 16
DOCS, TOKENS = 20, 250
SHOWN = (1, 2, 3)


class ToyRows:
    """Values of known norms: V is a random direction times `scale` [docs, tokens, L, H]."""

    def __init__(self, scale: torch.Tensor, heads: slice = slice(None)) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (DOCS, TOKENS, LAYERS, HEADS, SIZE)
        directions = torch.randn(shape, generator=generator)
        directions /= directions.norm(dim=-1, keepdim=True)
        self._values = (directions * scale[..., None]).flatten(0, 1)[:, :, heads].bfloat16()
        self.geometry = Geometry(LAYERS, self._values.shape[2], SIZE, SIZE, ((0, LAYERS),))
        self.positions = torch.arange(TOKENS).repeat(DOCS)
        self.docs = torch.arange(DOCS).repeat_interleave(TOKENS)
        self.heldout = self.docs % 5 == 4

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        assert kind == "v"
        return self._values[index, first:end]


def ordinary_scale(spread: float = 0.15) -> torch.Tensor:
    """[docs, tokens, L, H]: log-normal, layers of different sizes."""
    generator = torch.Generator().manual_seed(2)
    logs = spread * torch.randn(DOCS, TOKENS, LAYERS, 1, generator=generator)
    sizes = torch.linspace(-1, 2, LAYERS).view(1, 1, -1, 1)
    return (logs + sizes).exp().expand(-1, -1, -1, HEADS).clone()


def sink_places() -> torch.Tensor:
    """bool [docs, tokens]: two per document, past the first positions."""
    generator = torch.Generator().manual_seed(3)
    places = torch.zeros(DOCS, TOKENS, dtype=torch.bool)
    for doc in range(DOCS):
        drawn = torch.randperm(TOKENS - FIRST_POSITIONS, generator=generator)[:2]
        places[doc, drawn + FIRST_POSITIONS] = True
    return places


def with_sinks(drop: float = 1.8, layers: tuple[int, ...] = SHOWN) -> torch.Tensor:
    scale = ordinary_scale()
    for layer in layers:
        scale[..., layer, :][sink_places()] *= torch.tensor(-drop).exp()
    return scale


def test_planted_sinks_are_found_where_they_are() -> None:
    rows = ToyRows(with_sinks())
    found = fit_sinks(rows)
    assert found is not None
    assert found.rule.layers == SHOWN
    every = torch.arange(len(rows.positions))
    marks = found.rule.measure(rows.cache_rows("v", every, 0, LAYERS)) < found.rule.threshold
    assert torch.equal(marks, sink_places().flatten())
    assert found.separation == pytest.approx(1.8, abs=0.15)
    # First positions are no part of either.
    share = 2 / (TOKENS - FIRST_POSITIONS)
    assert found.train_share == found.heldout_share == pytest.approx(share)
    assert found.documents == 1.0
    assert found.valley < 0.05


def bos_sink() -> torch.Tensor:
    """The first token of every document, told by its place, and nothing else."""
    scale = ordinary_scale()
    scale[:, 0] *= 0.05
    return scale


def long_tail() -> torch.Tensor:
    """Norms that reach far down without a second mode."""
    generator = torch.Generator().manual_seed(4)
    tail = torch.empty(DOCS, TOKENS, 1, 1).exponential_(2.0, generator=generator)
    return ordinary_scale() * (-tail).exp()


def many_small() -> torch.Tensor:
    """A fifth of all tokens: no sinks, whatever they are."""
    scale = ordinary_scale()
    scale[:, ::5] *= 0.15
    return scale


def few_small() -> torch.Tensor:
    """Five tokens among five thousand."""
    scale = ordinary_scale()
    scale[:5, 100] *= 0.15
    return scale


@pytest.mark.parametrize(
    "scale", [ordinary_scale, bos_sink, long_tail, many_small, few_small], ids=lambda f: f.__name__
)
def test_models_without_floating_sinks_have_no_rule(scale: Callable[[], torch.Tensor]) -> None:
    assert fit_sinks(ToyRows(scale())) is None


def test_a_floating_sink_beside_that_of_the_first_token() -> None:
    scale = with_sinks()
    scale[:, 0] *= 0.01
    beside, alone = fit_sinks(ToyRows(scale)), fit_sinks(ToyRows(with_sinks()))
    assert beside == alone


def test_a_layer_that_shows_them_faintly_is_taken_in() -> None:
    """Its own density has no valley, but the tokens that other layers tell lie low in it."""
    scale = with_sinks()
    generator = torch.Generator().manual_seed(5)
    wide = 0.5 * torch.randn(DOCS, TOKENS, 1, generator=generator)
    scale[..., 4, :] *= wide.exp()
    scale[..., 4, :][sink_places()] *= torch.tensor(-1.3).exp()
    alone = ToyRows(scale[:, :, 4:5].expand(-1, -1, LAYERS, -1))
    assert fit_sinks(alone) is None
    found = fit_sinks(ToyRows(scale))
    assert found is not None
    assert found.rule.layers == (*SHOWN, 4)


def test_a_rank_sees_its_own_heads_alone() -> None:
    scale = ordinary_scale()
    scale[..., 1] = with_sinks()[..., 1]
    assert fit_sinks(ToyRows(scale, slice(0, 1))) is None
    found = fit_sinks(ToyRows(scale, slice(1, 2)))
    assert found is not None
    assert found.rule.layers == SHOWN


def test_rows_that_are_all_held_out_show_nothing() -> None:
    rows = ToyRows(with_sinks())
    rows.heldout[:] = True
    assert fit_sinks(rows) is None
