"""The lossy codec keeps apart what computes otherwise, like the exact one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.models import with_settings
from tests.reliability.live.stepping import count, raw, wait_for

pytestmark = pytest.mark.vllm

LOSSY = 512
"""Tokens that are loaded of 640: all but the recent window."""


def test_updates_configurations_and_restarts(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    plain: Callable[..., Tokens],
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
) -> None:
    """Weights that are exchanged in place, another configuration, and restarts."""
    shown = prompts[:3]
    settings = with_settings(reference_model, tmp_path / "settings", rms_norm_eps=0.01)
    other = {"hf_config_path": str(settings)}
    expected = plain(reference_model, "epsilon", **other)[:3]
    extra = raw(tmp_path / "tier", preset="kvtc-8x")

    def reloaded(llm: Any) -> Tokens:
        assert llm.reset_prefix_cache()
        already = count(llm, "loaded_tokens")
        answers = greedy(llm, shown, ANSWER)
        assert count(llm, "loaded_tokens") - already == 3 * LOSSY
        return answers

    with engine(reference_model, extra) as llm:
        assert greedy(llm, shown, ANSWER) == before[:3]
        wait_for(llm, "disk_written_chunks", 15)
        approximated = reloaded(llm)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(updated)})
        assert llm.reset_prefix_cache(reset_connector=True)
        assert greedy(llm, shown, ANSWER) == after[:3]
        assert reloaded(llm) != approximated
    with engine(reference_model, extra, **other) as llm:
        assert greedy(llm, shown, ANSWER) == expected
        assert count(llm, "loaded_tokens") == 0
    with engine(reference_model, extra) as llm:
        assert greedy(llm, shown, ANSWER) == approximated
        assert count(llm, "loaded_tokens") == 3 * LOSSY
