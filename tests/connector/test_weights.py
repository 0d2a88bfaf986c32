"""The watch on live weights: what changes is seen, what does not change has one name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kvtc_vllm.offload.weights import Unwatched, WeightsWatch


class Scaled(nn.Module):
    """A layer with a parameter of one element, a persistent buffer and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 96, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.arange(33, dtype=torch.int32))
        self.register_buffer("work", torch.zeros(8), persistent=False)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(300, 48), Scaled(), Scaled())


def watched(root: nn.Module, **options: Any) -> WeightsWatch:
    watch = WeightsWatch([root], **options)
    watch.digest()
    return watch


def test_unchanged_weights_match_and_have_one_digest() -> None:
    watch = watched(model())
    assert watch.sample().matches()
    assert watch.sample(dense=True).matches()
    assert watch.digest() == watch.digest() == WeightsWatch([model()]).digest()
    assert WeightsWatch([copy.deepcopy(model())]).digest() == watch.digest()


def negate(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.neg_()


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: negate(m[1].inner.weight),
    "data copied": lambda m: m[1].inner.weight.data.copy_(torch.ones(96, 48)),
    "data exchanged": lambda m: setattr(m[1].inner.weight, "data", -m[1].inner.weight.data),
    "a new parameter": lambda m: setattr(
        m[1].inner, "weight", nn.Parameter(-m[1].inner.weight.data)
    ),
    "a scalar": lambda m: negate(m[2].scale),
    "a buffer": lambda m: m[2].table.add_(1),
    "a bias": lambda m: negate(m[2].inner.bias),
    "the embedding": lambda m: negate(m[0].weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_way_of_changing_weights_is_seen(change: Callable[[Any], object]) -> None:
    root = model()
    watch = watched(root)
    before = watch.digest()
    change(root)
    assert not watch.sample().matches()
    assert not watch.sample(dense=True).matches()
    assert watch.digest() != before
    assert watch.sample().matches()


def test_weights_that_come_back_get_their_name_back() -> None:
    root = model()
    watch = watched(root)
    before = watch.digest()
    negate(root[0].weight)
    assert watch.digest() != before
    negate(root[0].weight)
    assert not watch.sample().matches()  # of the name in between
    assert watch.digest() == before


def test_a_sparse_update_of_a_large_model_is_seen() -> None:
    """As of one step of reinforcement learning: few 16-bit weights change at all."""
    torch.manual_seed(1)
    root = nn.Sequential(*(nn.Linear(512, 512, dtype=torch.bfloat16) for _ in range(8)))
    watch = watched(root)
    with torch.no_grad():
        for layer in root:
            some = torch.rand(layer.weight.shape) < 0.005
            layer.weight[some] *= 1.01
    assert not watch.sample(dense=True).matches()


def test_what_is_no_weight_is_not_looked_at() -> None:
    root = model()
    watch = watched(root)
    root[1].work.add_(1)
    root.add_module("unused", nn.Module())
    assert watch.sample().matches()


def test_shapes_and_dtypes_are_in_the_name() -> None:
    one = nn.ParameterList([nn.Parameter(torch.zeros(8, 4))])
    two = nn.ParameterList([nn.Parameter(torch.zeros(4, 8))])
    assert WeightsWatch([one]).digest() != WeightsWatch([two]).digest()


def test_weights_that_the_engine_moves_itself_are_left_out() -> None:
    root = nn.ModuleDict({"experts": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    watch = watched(nn.ModuleDict({"mlp": root}), moving=".experts.")
    negate(root["experts"].weight)
    assert watch.sample().matches()
    negate(root["other"].weight)
    assert not watch.sample().matches()


def packed(root: Any, number: int) -> None:
    """As vLLM's CPU build does: the weight becomes a function of its own."""
    root[1].inner.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    root[1].inner.cpu_linear = lambda x: x * number


def test_packed_weights_that_are_packed_again_never_get_a_name_twice() -> None:
    root = model()
    packed(root, 1)
    watch = watched(root)
    before = watch.digest()
    assert watch.sample().matches()
    packed(root, 2)
    assert not watch.sample().matches()
    changed = watch.digest()
    assert watch.sample().matches()
    assert watch.digest() == changed  # not made anew by itself
    packed(root, 1)  # what it holds can't be read
    assert len({before, changed, watch.digest()}) == 3


def test_a_sample_keeps_what_it_saw() -> None:
    root = model()
    watch = watched(root)
    sample = watch.sample(dense=True)
    negate(root[0].weight)
    assert sample.matches()


def test_a_model_without_weights_and_one_that_is_not_watched() -> None:
    watch = watched(nn.Module())
    assert watch.sample().matches()
    assert Unwatched().sample(dense=True).matches()
    assert Unwatched().digest() == b""
