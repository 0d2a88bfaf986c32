"""The compiler's wrapper."""

from __future__ import annotations

import errno

import numba
import pytest
from numba.core import caching

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


@pytest.mark.parametrize("fails", ["save", "load"])
def test_it_compiles_where_the_cache_can_not_be_used(
    monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """As on a full disk."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, fails, full)
    assert jit(plus_one)(1) == 2
