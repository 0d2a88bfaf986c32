"""The compiler's wrapper."""

from __future__ import annotations

import numba
import pytest

from kvtc_vllm.codec.cpu.jit import jit


def plus_one(x: int) -> int:
    return x + 1


def test_it_compiles_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = numba.njit

    def njit(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(function, **options)

    monkeypatch.setattr(numba, "njit", njit)
    compiled = jit(plus_one)
    assert compiled(1) == 2
    assert compiled is not plus_one
