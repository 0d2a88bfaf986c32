"""What kernel tests of every codec with kernels need to make one.

`EVERY` is for quick tests: the codecs, and codec 2 with K and V as pairs. With `ALL`, codec 2 is
left out unless KVTC_KERNELS is "all" or there is a GPU: what such a test looks at is shared by the
codecs, and the interpreter is slow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

REFERENCE: dict[str, type[TransformCodec]] = {"kvtc": KvtcCodec, "kvtc2": Kvtc2Codec}
PAIRED = "kvtc2 paired"
EVERY = (*REFERENCE, PAIRED)
LATER = pytest.mark.skipif(
    os.environ.get("KVTC_KERNELS") != "all" and not torch.cuda.is_available(),
    reason="make test-kernels runs it",
)
ALL = ("kvtc", *(pytest.param(name, marks=LATER) for name in ("kvtc2", PAIRED)))
SINKS = SinkRule(layers=(1,), threshold=-1.0, max_share=0.2)
"""A rule by which `mark` makes sinks."""


def artifact_of(
    name: str,
    model: SyntheticModel,
    ratios: tuple[float, ...],
    fit_rows: int = 512,
    rule: SinkRule | None = SINKS,
) -> RankArtifact:
    """An artifact of the synthetic model; of codec 2 with a sink rule. name: one of `EVERY`."""
    if name == "kvtc":
        return model.artifact(ratios, fit_rows)
    return step_artifact(model, ratios, rule, fit_rows, paired=name == PAIRED)


def mark(values: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """V [T, L, H, Dv] of which these tokens are sinks by `SINKS`."""
    values = values.clone()
    values[list(tokens), 1] *= 2.0**-9
    return values
