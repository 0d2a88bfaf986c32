"""numba's compiler, typed. It is imported with the first module that decorates with it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

logger = logging.getLogger("vllm.kvtc")

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
        _do_without(compiled._cache)
    except RuntimeError:
        # No directory that numba could keep it in can be written; every process compiles.
        compiled = numba.njit(function, nogil=True)
    return cast(Callable[P, R], compiled)


def _do_without(cache: Any) -> None:
    """Have numba compile and go on where its cache can't be used, as on a full disk."""
    for name in ("load_overload", "save_overload"):
        setattr(cache, name, partial(_if_possible, getattr(cache, name)))


def _if_possible(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        logger.warning("kvtc: numba's cache of compiled functions can't be used: %s", error)
        return None


def _let_vllm_scan() -> None:
    """Let vLLM start in a process that has imported numba.

    vLLM 0.32 for CPU asks everything in every module for its `__dict__`. llvmlite's library object
    makes a C function of whatever it is asked for, and vLLM stops at one without `get`.
    """
    from llvmlite.binding import ffi

    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
