"""Multi-head latent attention in a real vLLM: reloaded, calibrated, served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import find
from tests.connector.engine import greedy, metrics, texts
from tests.hybrid.calibrating import BASES, calibrate
from tests.hybrid.families import LATENTS
from tests.hybrid.running import RAW, ask, difference, loading_zeros, prompts, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs them"
    ),
]

SAME, DIFFERENT = 2e-3, 2e-2
"""Of the first token's logprobs: behind a prefix, keys and values are made of latents again, which
rounds float32 otherwise than the prefill of the whole prompt."""
BLOCK = 16
TOKENS, HIT = 650, 640
ROTATED, LATENT = 64, 512
RATIOS = {"kvtc": 2.0, "kvtc2": 4.0}
"""Random weights have rows of many directions."""


@pytest.mark.parametrize("family", LATENTS)
def test_a_reload_equals_what_was_computed(
    family: str, family_model: Callable[[str], Path]
) -> None:
    """vLLM's CPU build has no prefix cache for these models, so there is no hit to compare with."""
    prompts_ = prompts(2, TOKENS)
    with start(family_model(family), RAW, block_size=BLOCK) as llm:
        computed = ask(llm, prompts_, tokens=1)
        assert metrics(llm).get("kvtc_hit_tokens", 0) == 0
        loaded = ask(llm, prompts_, tokens=1)
        values = metrics(llm)
        assert values["kvtc_hit_tokens"] == values["external_prefix_cache_hits"] == 2 * HIT
        assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
        assert difference(loaded, computed) < SAME
        # One latent and one rotated key per layer, in float32.
        assert values["kvtc_stored_raw_bytes"] == 2 * HIT * 4 * (ROTATED + LATENT) * 4
        with loading_zeros(0):
            assert difference(ask(llm, prompts_, tokens=1), computed) > DIFFERENT


@pytest.mark.parametrize("codec", BASES)
def test_calibrate_then_serve(reference_model: Path, tmp_path: Path, codec: str) -> None:
    ratio = RATIOS[codec]
    engine = '{"block_size": 16, "max_model_len": 1024, "dtype": "float32"}'
    model, out = calibrate("deepseek", reference_model, tmp_path, ratio, engine, codec)

    directory = find(model_identity(model), 1, ratio, model_name="tiny", registries=[out])
    artifact, card, _ = load_rank_artifact(directory, 0)
    geometry = artifact.geometry
    assert (geometry.num_kv_heads, geometry.head_size, geometry.head_size_v) == (1, ROTATED, LATENT)
    # Pairs lie next to each other, and all of what is called K is rotated.
    assert [(rope.rotary_dim, rope.neox) for rope in artifact.ropes] == [(ROTATED, False)]
    assert card.data.train_tokens > 2000
    # The rotated key and the latent are made of one hidden state, and may share a basis.
    rows = [(s.kind, s.row_size) for s in card.sections]
    together = [("kv", 4 * (ROTATED + LATENT))]
    assert rows == (together if codec == "kvtc2" else [("k", 4 * ROTATED), ("v", 4 * LATENT)])

    prompts_ = texts(reference_model, count=2, tokens=650)
    extra = {"codec": codec, "ratio": ratio, "registry": [str(out)], "memory_bytes": "64MiB"}
    with start(model, extra, skip_tokenizer_init=False, block_size=BLOCK) as llm:
        greedy(llm, prompts_, 8)
        greedy(llm, prompts_, 8)
        values = metrics(llm)
    assert values["kvtc_hit_tokens"] == values["external_prefix_cache_hits"] == 2 * 512
    assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
    assert values["kvtc_kind_stored_bytes"] == values["kvtc_stored_bytes"]
    # Of float32 elements twice the ratio is planned; these few words deflate well, but ratios of
    # codec 2 are of real bytes.
    least, most = (ratio, 4 * ratio) if codec == "kvtc2" else (2 * ratio, 20)
    assert least < values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] < most
