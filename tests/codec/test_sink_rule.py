"""Attention sinks by the norm of their values."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.sink_rule import SinkRule

LAYERS = 4


def values(tokens: int, sinks: dict[int, float]) -> torch.Tensor:
    """bfloat16 [T, L, 2, 8] of norm about 4; in layers 1 and 2 the sinks are scaled."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(tokens, LAYERS, 2, 8, generator=generator)
    for token, scale in sinks.items():
        made[token, 1:3] *= scale
    return made.bfloat16()


def test_tokens_of_collapsed_values_are_marked() -> None:
    rule = SinkRule(layers=(1, 2), threshold=0.5)
    marks = rule.marks(values(128, {11: 0.15, 82: 0.1}))
    assert marks.nonzero().flatten().tolist() == [11, 82]


def test_other_layers_do_not_tell() -> None:
    rule = SinkRule(layers=(0, 3), threshold=0.5)
    assert not rule.marks(values(128, {11: 0.15})).any()


def test_the_share_keeps_the_smallest_norms() -> None:
    rule = SinkRule(layers=(1, 2), threshold=0.5, max_share=0.015)
    marks = rule.marks(values(128, {5: 0.2, 11: 0.05, 82: 0.1}))
    assert marks.nonzero().flatten().tolist() == [11, 82]


def test_chunks_together_are_marked_as_each_alone() -> None:
    rule = SinkRule(layers=(0,), threshold=-0.5, max_share=0.2)
    drawn = torch.Generator().manual_seed(0)
    tokens = [1, 28, 32, 3, 32, 32]
    measure = torch.randn(sum(tokens), generator=drawn)
    # None, a few, and more than the rule allows.
    measure[1:29] = 1.0
    measure[29:32] = -1.0
    measure[32:61] = 1.0
    together = rule.marked_in(measure, tokens)
    alone = [rule.marked(part) for part in measure.split(tokens)]
    assert [marks.tolist() for marks in together] == [marks.tolist() for marks in alone]
    assert [int(marks.sum()) for marks in together[1:3]] == [0, 3]
    assert int((measure[-32:] < rule.threshold).sum()) > rule.most(32) == int(together[-1].sum())
    assert rule.marked_in(measure[:0], []) == []


def test_zero_values_have_a_finite_measure() -> None:
    rule = SinkRule(layers=(1, 2), threshold=0.5)
    measure = rule.measure(torch.zeros(3, LAYERS, 2, 8))
    assert bool(torch.isfinite(measure).all())
    assert rule.marks(torch.zeros(3, LAYERS, 2, 8)).sum() == 1


@pytest.mark.parametrize(
    ("layers", "threshold", "share", "field"),
    [
        ((), 0.0, 0.1, "layers"),
        ((-1, 2), 0.0, 0.1, "layers"),
        ((2, 2), 0.0, 0.1, "layers"),
        ((0,), float("nan"), 0.1, "threshold"),
        ((0,), 0.0, 0.0, "max_share"),
        ((0,), 0.0, 1.5, "max_share"),
    ],
)
def test_bad_rules_name_the_field(
    layers: tuple[int, ...], threshold: float, share: float, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        SinkRule(layers, threshold, share)
