"""Where kernel tests run: in Triton's interpreter, or compiled on a GPU. Never both in one process.

@pytest.mark.parametrize("device", DEVICES)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which vLLM brings: pip install triton")

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="kernels are compiled where there is a GPU"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Counted:
    """A kernel that notes its launches in `names`."""

    def __init__(self, names: list[str], name: str, kernel: Any) -> None:
        self._names, self._name, self._kernel = names, name, kernel

    def __getitem__(self, grid: Any) -> Any:
        self._names.append(self._name)
        return self._kernel[grid]
