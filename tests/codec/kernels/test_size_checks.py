"""Chunks that cannot be stored: told for a step at once, and why for each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.quantizers.base import FP16_MAX
from kvtc_vllm.codec.v2.codes import MAX_LEVEL
from tests.codec.kernels.codecs import EVERY, SINKS, artifact_of
from tests.codec.synthetic import SyntheticModel

pytest.importorskip("triton", reason="kernels need Triton, which vLLM brings: pip install triton")

from kvtc_vllm.codec.kernels.bit_payloads import BitPayloads  # isort: skip
from kvtc_vllm.codec.kernels.payload_coding import CodedSizes  # isort: skip
from kvtc_vllm.codec.kernels.step_payloads import StepPlanPayloads  # isort: skip

MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=1, head_size=4, head_size_v=4, layer_groups=((0, 1), (1, 2))
)
CHUNKS = 400
MAGNITUDES = [1.0, MAX_LEVEL, FP16_MAX, 2 * FP16_MAX, math.inf, math.nan]


def refused(coding, coded: CodedSizes, place: int) -> bool:
    try:
        coding.check(coded, place)
    except CodecError:
        return True
    return False


@pytest.mark.parametrize("rule", [SINKS, None])
@pytest.mark.parametrize("name", EVERY)
def test_doubtful_chunks_are_those_that_are_refused(name, rule) -> None:
    artifact = artifact_of(name, MODEL, (4.0, 8.0), fit_rows=256, rule=rule)
    kind = BitPayloads if name == "kvtc" else StepPlanPayloads
    coding = kind(artifact, 8.0, torch.device("cpu"), torch.float32)
    drawn = np.random.default_rng(0)
    tokens = drawn.choice([28, 32], CHUNKS)
    # Without a rule blobs do not say which tokens are marked.
    marked = drawn.choice([0, 0, 2, 7] if rule else [0], CHUNKS)
    sizes = drawn.integers(0, 40, (CHUNKS, len(coding.sections), 3))
    # About half of the chunks have a section near its bound.
    most = max(plan.max_bytes(32) for plan in coding.plans.values())
    large = drawn.random(sizes.shape[:2]) < 0.6 / len(coding.sections)
    sizes[..., 2] = np.where(large, drawn.integers(most - 300, most + 50, large.shape), 40)
    magnitudes = np.where(drawn.random(CHUNKS) < 0.8, 1.0, drawn.choice(MAGNITUDES, CHUNKS))
    coded = CodedSizes(magnitudes, sizes, tokens, marked)
    doubtful = coding.doubtful(coded)
    assert doubtful.tolist() == [refused(coding, coded, place) for place in range(CHUNKS)]
    assert 0.05 < doubtful.mean() < 0.95
