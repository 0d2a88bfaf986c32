"""One directory, engines with other settings: what a model computes decides, not what it is called.

The exact codec, which compares no artifact, so that only a chunk's namespace keeps them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.models import theta_override, with_settings
from tests.reliability.live.stepping import count, raw

pytestmark = pytest.mark.vllm

SHOWN = 2
LOADED = SHOWN * 608
HEAD = 32
"""Frequencies of a head: half of its size."""
THETA = {"rope_type": "default", "rope_theta": 1e6}
"""Instead of the reference model's 10000."""
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * HEAD,
    "long_factor": [4.0] * HEAD,
    "original_max_position_embeddings": 1024,
}
"""One set of settings that rotates otherwise where the engine may go beyond 1024 tokens."""


@dataclass(frozen=True)
class SetUp:
    """Options of an engine. computes: a name for what they make of the model."""

    computes: str
    options: dict[str, Any]


def function(theta: float, computes: str) -> SetUp:
    return SetUp(computes, {"hf_overrides": theta_override(theta)})


def longrope(computes: str, max_model_len: int) -> SetUp:
    overrides = {"rope_parameters": LONGROPE}
    return SetUp(computes, {"hf_overrides": overrides, "max_model_len": max_model_len})


def config_path(model: Path, place: Path, computes: str, **settings: Any) -> SetUp:
    return SetUp(computes, {"hf_config_path": str(with_settings(model, place, **settings))})


def two_set_ups(case: str, model: Path, place: Path) -> tuple[SetUp, SetUp]:
    """Two engines that differ in the way told."""
    if case == "functions of one name":
        return function(1e4, "default"), function(1e6, "theta")
    if case == "longrope":
        return longrope("short factors", 1024), longrope("long factors", 2048)
    if case == "overrides":
        other = SetUp("theta", {"hf_overrides": {"rope_parameters": THETA}})
    elif case == "config path, theta":
        other = config_path(model, place / "settings", "theta", rope_parameters=THETA)
    else:
        assert case == "config path, epsilon"
        other = config_path(model, place / "settings", "epsilon", rms_norm_eps=0.01)
    return SetUp("default", {}), other


@pytest.mark.parametrize(
    "case",
    [
        "functions of one name",
        "overrides",
        "config path, theta",
        "config path, epsilon",
        "longrope",
    ],
)
def test_engines_that_compute_otherwise_share_no_chunk(
    case: str,
    reference_model: Path,
    prompts: Tokens,
    plain: Callable[..., Tokens],
    tmp_path: Path,
) -> None:
    one, two = two_set_ups(case, reference_model, tmp_path)
    expected = {
        set_up.computes: plain(reference_model, set_up.computes, **set_up.options)[:SHOWN]
        for set_up in (one, two)
    }
    assert expected[one.computes] != expected[two.computes]
    disk = tmp_path / "tier"
    for set_up, loaded in ((one, 0), (two, 0), (one, LOADED)):
        with engine(reference_model, raw(disk), **set_up.options) as llm:
            assert greedy(llm, prompts[:SHOWN], ANSWER) == expected[set_up.computes]
            assert count(llm, "loaded_tokens") == loaded
