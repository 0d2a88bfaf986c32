"""Memory beside the KV cache: what is taken of what is free."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("vllm")

from kvtc_vllm.connector.sizing import (
    LEAST_STAGING_BYTES,
    LEAST_WORKSPACE_BYTES,
    MOST_WORKSPACE_BYTES,
    divide,
    log_plan,
)
from tests.connector.fakes import geometry

GIB = 1 << 30


def test_staging_holds_two_steps() -> None:
    """8192 tokens of an 8B model in bfloat16, on a device with plenty."""
    plan = divide(None, GIB, 14 * GIB)
    assert plan.staging == 2 * GIB
    assert plan.workspace == MOST_WORKSPACE_BYTES


def test_small_steps_and_no_device() -> None:
    assert divide(None, 1 << 20, None).staging == LEAST_STAGING_BYTES
    assert divide(None, 3 * GIB, None).staging == 6 * GIB


@pytest.mark.parametrize("free", [GIB // 2, 2 * GIB, 5 * GIB])
@pytest.mark.parametrize("threads", [2, 3, 16])
def test_a_stated_share_of_what_is_free_stays(free: int, threads: int) -> None:
    plan = divide(None, GIB, free, threads)
    assert plan.reserved >= max(free // 4, min(GIB, free // 2))
    if plan.workspace > LEAST_WORKSPACE_BYTES:
        assert plan.staging + threads * plan.workspace + plan.reserved <= free
    assert plan.free == free


def test_the_log_line_has_every_part(caplog: pytest.LogCaptureFixture) -> None:
    plan = divide(None, 128 << 20, 6 * GIB, 3)
    with caplog.at_level(logging.INFO, "vllm.kvtc"):
        log_plan(plan, geometry(), 318 << 20, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    parts = (318 << 20, plan.free, plan.staging, plan.workspace, plan.reserved)
    for size in parts:
        assert f"{(size or 0) / 2**20:.1f} MiB" in line
    assert "3 x" in line


def test_a_full_device_still_gets_a_workspace() -> None:
    plan = divide(None, GIB, 1 << 20)
    assert plan.workspace == LEAST_WORKSPACE_BYTES


def test_what_is_configured_is_taken() -> None:
    assert divide(123, GIB, GIB).staging == 123
