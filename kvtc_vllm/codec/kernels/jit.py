"""The kernels' decorator: compiled for a GPU, interpreted where there is none.

Interpreted kernels exist for tests. They do not depend on the TRITON_INTERPRET variable, which
would have to be set before anything imports Triton. For the same reason kernels must not use
those `tl` functions that are kernels themselves (`tl.max`, `tl.sum`, `tl.zeros`, `tl.cdiv`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

EXACT = {"enable_fp_fusion": False}
"""Launch option of kernels whose float32 results must equal the CPU's: no fused multiply-add."""


def jit(
    do_not_specialize: Sequence[str] = (), any_alignment: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel or a function called by kernels.

    do_not_specialize: integer arguments whose value must not cause a recompilation.
    any_alignment: pointers whose alignment must not.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if torch.cuda.is_available():
            return triton.jit(
                function,
                do_not_specialize=list(do_not_specialize),
                do_not_specialize_on_alignment=list(any_alignment),
            )
        return _Interpreted(function)

    return decorate


_INTERPRETER = threading.Lock()


class _Interpreted(InterpretedFunction):  # type: ignore[misc]
    """The interpreter exchanges parts of `tl` while a kernel runs, so one may run at a time."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        launch = super().__getitem__(grid)

        def launch_alone(*arguments: Any, **options: Any) -> None:
            with _INTERPRETER:
                launch(*arguments, **options)

        return launch_alone
