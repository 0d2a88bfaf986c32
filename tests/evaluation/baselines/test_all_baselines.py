"""What every baseline must do, whatever it stores."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.evaluation.baselines import BASELINES
from tests.evaluation.baselines.samples import (
    START,
    make,
    random_cache,
    relative_error,
    reload,
    rope,
    structured_cache,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 31, 32, 33, 100, 256)
# Share of the squared norm of normal noise that may be lost. xKV drops directions; no two blocks
# of noise are alike enough to be fused.
NOISE_LOST = {
    "fp8-e4m3": 0.001,
    "kivi-2bit": 0.17,
    "kivi-4bit": 0.008,
    "gear-2bit": 0.17,
    "gear-4bit": 0.008,
    "xkv": 0.8,
    "cachegen": 0.2,
    "cachegen-lmcache": 0.006,
    "joint-fusion": 0.0001,
    "joint-fusion-strict": 0.0001,
    "turboquant-4bit": 0.015,
    "turboquant-3bit": 0.05,
    "turboquant-3.5bit": 0.04,
    "turboquant-2.5bit": 0.12,
    "quantspec-8bit": 0.0001,
    "quantspec-4bit": 0.01,
    "think-40": 0.5,
    "think-40-kivi": 0.5,
    "swan-16bit": 0.2,
    "swan-8bit": 0.2,
    "lorc": 0.8,
    "recalkv": 0.6,
    "deltakv": 0.25,
}

FINER = (
    ("kivi-2bit", {"group": 16}),
    ("kivi-4bit", {"group": 8}),
    ("gear-2bit", {"rank": 8}),
    ("gear-4bit", {"outliers": 0.1}),
    ("xkv", {"keys": 0.3, "values": 0.3}),
    ("cachegen", {"bins": 0.5}),
    ("think-40", {"pruned": 0.2}),
    ("think-40-kivi", {"pruned": 0.2}),
    ("swan-16bit", {"kept": 0.75}),
    ("swan-8bit", {"kept": 0.75}),
    ("lorc", {"scale": 1.5}),
    ("recalkv", {"share": 0.75}),
    ("deltakv", {"stride": 5}),
)
"""Settings that store more than a method's own, and lose less."""

every_method = pytest.mark.parametrize("name", BASELINES)


@every_method
def test_has_a_source_and_its_own_name(name):
    assert BASELINES[name].name == name
    assert BASELINES[name].source


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_second_instance_restores_from_the_bytes(name, dtype, tokens):
    k, v = random_cache(tokens, dtype)
    restored = reload(make(name, dtype), k, v)
    for original, back in zip((k, v), restored, strict=True):
        assert back.shape == original.shape
        assert back.dtype == dtype
        assert relative_error(back, original) <= NOISE_LOST[name]


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bytes_every_time_and_for_any_strides(name, dtype):
    k, v = (x.to(dtype) for x in structured_cache(100))
    method = make(name, dtype)
    reference = method.compress(k, v, START)
    assert method.compress(k, v, START) == reference
    strided = (x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0) for x in (k, v))
    assert method.compress(*strided, START) == reference


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_is_left_alone(name, dtype):
    k, v = (x.to(dtype) for x in structured_cache(70))
    before = k.clone(), v.clone()
    make(name, dtype).compress(k, v, START)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-7, 60000.0])
def test_constant_and_extreme_caches_stay_finite(name, dtype, value):
    signs = torch.where(torch.arange(130) % 3 == 0, -1.0, 1.0)[:, None, None, None]
    k, v = ((torch.full_like(x, value) * signs).to(dtype) for x in random_cache(130, dtype))
    for back in reload(make(name, dtype), k, v):
        assert back.isfinite().all()
        if value == 0.0:
            assert not back.any()


@pytest.mark.parametrize(("name", "given"), FINER, ids=lambda x: x if isinstance(x, str) else "")
def test_settings_buy_quality_with_bytes(name, given):
    k, v = structured_cache(256)
    found = []
    for settings in ({}, given):
        method = make(name, torch.bfloat16, **settings)
        error = sum(
            relative_error(*pair) for pair in zip(reload(method, k, v), (k, v), strict=True)
        )
        found.append((sum(map(len, method.compress(k, v, START))), error))
    (plain_bytes, plain_error), (more_bytes, less_error) = found
    assert more_bytes > plain_bytes
    assert less_error < plain_error


@every_method
def test_position_only_matters_with_a_rotary_embedding(name):
    k, v = structured_cache(64)
    method = make(name)
    assert method.compress(k, v, 0) == method.compress(k, v, 500)


@every_method
def test_ropes_must_be_one_a_layer(name):
    with pytest.raises(ValueError, match="rotary"):
        make(name, ropes=(rope(),))
