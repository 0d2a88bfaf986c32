"""Which cache element types and scales are served; the others get one clear sentence."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.platforms import current_platform

from kvtc_vllm.connector.scales import find_scales
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from kvtc_vllm.vllm_cache.cache_dtype import cache_dtype
from kvtc_vllm.vllm_cache.compat import UnsupportedError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GROUP = CacheGroup(("layers.0", "layers.1"), 32, 2, 64, 64, E4M3)


def dtype_of(name: str, stored: torch.dtype, **config: Any) -> torch.dtype:
    engine = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=name, **config))
    return cache_dtype(engine, SimpleNamespace(dtype=stored))


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float16", torch.float16, torch.float16),
        ("fp8", torch.uint8, E4M3),
        ("fp8_e4m3", torch.uint8, E4M3),
        ("fp8_e4m3", E4M3, E4M3),
        ("fp8_e5m2", torch.uint8, E5M2),
        ("fp8_e5m2", E5M2, E5M2),
    ],
)
def test_served(name: str, stored: torch.dtype, expected: torch.dtype) -> None:
    assert dtype_of(name, stored) == expected


@pytest.mark.parametrize(
    ("name", "stored", "words"),
    [
        ("fp8_per_token_head", torch.uint8, "a scale of every token and head"),
        ("int8_per_token_head", torch.int8, "a scale of every token and head"),
        ("int4_per_token_head", torch.uint8, "a scale of every token and head"),
        ("nvfp4", torch.uint8, "4-bit"),
        ("nvfp4_4over6", torch.uint8, "4-bit"),
        ("turboquant_k8v4", torch.uint8, "codes of a few bits"),
        ("ultraquant_4bit", torch.uint8, "codes of a few bits"),
        ("fp8_ds_mla", torch.uint8, "MLA"),
        ("fp8_inc", E4M3, "Gaudi"),
        ("int8", torch.int8, "integers"),
        ("unheard_of", torch.uint8, "unheard_of is refused; use auto"),
        ("auto", torch.uint8, "auto is refused; use auto"),
        ("fp8", torch.bfloat16, "--kv-cache-dtype-skip-layers"),
        ("fp8_e5m2", E4M3, "float8_e4m3fn"),
    ],
)
def test_refused(name: str, stored: torch.dtype, words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        dtype_of(name, stored)
    message = str(caught.value)
    assert words in message
    assert f"--kv-cache-dtype {name}" in message
    assert "\n" not in message


def test_scales_that_change_are_refused() -> None:
    assert dtype_of("fp8", torch.uint8, calculate_kv_scales=False) == E4M3
    with pytest.raises(UnsupportedError, match="--calculate-kv-scales is refused"):
        dtype_of("fp8", torch.uint8, calculate_kv_scales=True)


def test_fnuz_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda cls: True))
    assert dtype_of("auto", torch.bfloat16) == torch.bfloat16
    with pytest.raises(UnsupportedError, match="fnuz"):
        dtype_of("fp8", torch.uint8)


def layer(k: Any = 1.0, v: Any = 1.0, backend: str = "CPU_ATTN") -> SimpleNamespace:
    name = SimpleNamespace(get_name=lambda: backend)
    return SimpleNamespace(_k_scale=torch.tensor(k), _v_scale=torch.tensor(v), attn_backend=name)


def scales_of(*layers: SimpleNamespace, dtype: torch.dtype = E4M3) -> Any:
    context = {f"layers.{i}": each for i, each in reversed(list(enumerate(layers)))}
    engine = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    return find_scales(engine, replace(GROUP, dtype=dtype))


def test_scales_are_those_of_the_layers() -> None:
    found = scales_of(layer(0.5, 2.0), layer(0.25, 1.0))
    assert {kind: x.tolist() for kind, x in found.items()} == {"k": [0.5, 0.25], "v": [2.0, 1.0]}
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert scales_of(layer(), layer([1.0])) is None
    # Layers of other caches have scales too, which their engine ignores.
    assert scales_of(layer(0.5), layer(), dtype=torch.bfloat16) is None


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (layer(k=[0.5, 0.5]), "2 fp8 scales of K; KVTC reads caches with one per layer"),
        (layer(v=[1.0, 1.0]), "2 fp8 scales of V"),
        (layer(k=0.0), "the fp8 scale 0.0 of K"),
        (layer(v=float("nan")), "the fp8 scale nan of V"),
        (SimpleNamespace(), "no _k_scale"),
    ],
)
def test_bad_scales_are_refused_by_layer(bad: SimpleNamespace, words: str) -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.1") as caught:
        scales_of(layer(), bad)
    assert words in str(caught.value)


def test_e5m2_is_refused_where_it_may_be_e4m3() -> None:
    for backend in ("CPU_ATTN", "FLASHINFER"):
        assert scales_of(layer(backend=backend), layer(backend=backend), dtype=E5M2) is None
    odd = layer(backend="TRITON_ATTN")
    assert scales_of(odd, odd) is None
    with pytest.raises(UnsupportedError, match=r"TRITON_ATTN of layer layers\.0.*use fp8_e4m3"):
        scales_of(odd, odd, dtype=E5M2)


def test_calibrating_on_an_fp8_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from kvtc_vllm.calibration import capture_connector as capture

    extra = {"spool": "nowhere"}
    transfer = SimpleNamespace(kv_connector_extra_config=extra, kv_load_failure_policy="fail")
    engine = SimpleNamespace(kv_transfer_config=transfer)
    monkeypatch.setattr(capture, "read_geometry", lambda *_: CacheGeometry((GROUP,), 1))
    with pytest.raises(UnsupportedError, match="calibrating on an fp8 KV cache is refused"):
        capture.KVTCCaptureConnector(engine, KVConnectorRole.SCHEDULER, None)
    monkeypatch.setattr(
        capture,
        "read_geometry",
        lambda *_: CacheGeometry((replace(GROUP, dtype=torch.bfloat16),), 1),
    )
    assert capture.KVTCCaptureConnector(engine, KVConnectorRole.SCHEDULER, None)
