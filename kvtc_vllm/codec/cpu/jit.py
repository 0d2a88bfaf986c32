"""numba's compiler, typed. It is imported with the first module that decorates with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at the first call; without the GIL, kept in numba's cache directory if there is one.

    Without fast-math, so that every float32 operation is rounded as written.
    """
    import numba

    _let_vllm_scan()
    try:
        compiled = numba.njit(function, cache=True, nogil=True)
    except RuntimeError:
        # No directory that numba could keep it in can be written; every process compiles.
        compiled = numba.njit(function, nogil=True)
    return cast(Callable[P, R], compiled)


def _let_vllm_scan() -> None:
    """Let vLLM start in a process that has imported numba.

    vLLM 0.32 for CPU asks everything in every module for its `__dict__`. llvmlite's library object
    makes a C function of whatever it is asked for, and vLLM stops at one without `get`.
    """
    from llvmlite.binding import ffi

    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
