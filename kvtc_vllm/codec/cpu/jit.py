"""numba's compiler, typed. It is imported with the first module that decorates with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call; without the GIL, kept in numba's cache directory.

    Without fast-math, so that every float32 operation is rounded as written.
    """
    import numba

    return cast(Callable[P, R], numba.njit(function, cache=True, nogil=True, boundscheck=False))
