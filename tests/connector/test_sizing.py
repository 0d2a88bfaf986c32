"""Memory beside the KV cache: what is taken of what is free."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvtc_vllm.connector.sizing import (
    LEAST_STAGING_BYTES,
    LEAST_WORKSPACE_BYTES,
    MOST_WORKSPACE_BYTES,
    divide,
)

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
def test_a_quarter_of_what_is_free_stays(free: int) -> None:
    plan = divide(None, GIB, free)
    assert plan.staging + 2 * plan.workspace <= 3 * free // 4
    assert plan.free == free


def test_a_full_device_still_gets_a_workspace() -> None:
    plan = divide(None, GIB, 1 << 20)
    assert plan.workspace == LEAST_WORKSPACE_BYTES


def test_what_is_configured_is_taken() -> None:
    assert divide(123, GIB, GIB).staging == 123
