"""fp8 KV caches in a real vLLM, on the CPU build. Also run on an older vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.connector import startup
from tests.connector.engine import engine, greedy, metrics, texts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not torch.cpu._is_avx512_supported(), reason="vLLM's CPU build has fp8 caches with AVX-512"
    ),
]
TOKENS, COUNT = 700, 4


@pytest.fixture(scope="module")
def prompts(reference_model: Path) -> list[list[int]]:
    return texts(reference_model, count=COUNT, tokens=TOKENS)


def agree(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Fraction of positions with the same token."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def failures(values: dict[str, float]) -> dict[str, float]:
    names = ("kvtc_failed_loads", "kvtc_dropped_stores")
    return {name: count for name, count in values.items() if count and name.startswith(names)}


def test_raw_reload_is_exact(reference_model: Path, prompts: list[list[int]]) -> None:
    with engine(reference_model, None, kv_cache_dtype="fp8") as llm:
        expected = greedy(llm, prompts, 48)
    extra = {"preset": "raw", "memory_bytes": "64MiB"}
    with engine(reference_model, extra, kv_cache_dtype="fp8") as llm:
        assert greedy(llm, prompts, 48) == expected
        assert llm.reset_prefix_cache()
        assert greedy(llm, prompts, 48) == expected
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == values["kvtc_loaded_tokens"] == COUNT * 640
        assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"]
        assert not failures(values)
        # 8 layers, 2 heads of 64, K and V, a byte each.
        assert values["kvtc_stored_raw_bytes"] == values["kvtc_stored_chunks"] * 128 * 2048


@pytest.mark.parametrize(
    ("cache_dtype", "scales"), [("fp8", (0.11, 0.05)), ("fp8_e5m2", (1.0, 1.0))]
)
def test_kvtc_reloads_what_the_engine_stored(
    reference_model: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    cache_dtype: str,
    scales: tuple[float, float],
) -> None:
    _scale_caches(monkeypatch, *scales)
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    extra = {"codec": "kvtc", "ratio": 16, "memory_bytes": "64MiB"}
    with engine(reference_model, extra, kv_cache_dtype=cache_dtype) as llm:
        cold = greedy(llm, prompts, 24)
        assert llm.reset_prefix_cache()
        warm = greedy(llm, prompts, 24)
        values = metrics(llm)
        known = get_kv_transfer_group()._worker.transfers[0].codec.artifact.scales
    if scales == (1, 1):
        assert known is None
    else:
        assert {kind: x.tolist() for kind, x in known.items()} == {
            kind: pytest.approx([x] * 8) for kind, x in zip("kv", scales, strict=True)
        }
    assert values["kvtc_hit_tokens"] == values["kvtc_loaded_tokens"] == COUNT * 544
    assert not failures(values)
    assert 6.5 < values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] < 10
    assert agree(warm, cold) > 0.5


def _scale_caches(monkeypatch: pytest.MonkeyPatch, of_k: float, of_v: float) -> None:
    """What a checkpoint with `k_scale` and `v_scale` does to the layers, before their first use."""
    find = startup.find_scales

    def scaled(vllm_config: Any, geometry: Any) -> Any:
        for layer in vllm_config.compilation_config.static_forward_context.values():
            layer._k_scale.fill_(of_k)
            layer._v_scale.fill_(of_v)
            layer._k_scale_float, layer._v_scale_float = of_k, of_v
        return find(vllm_config, geometry)

    monkeypatch.setattr(startup, "find_scales", scaled)
