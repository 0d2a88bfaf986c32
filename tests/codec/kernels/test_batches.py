"""Which sections share products, and the products as a GPU is asked for them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="kernels need Triton, which vLLM brings: pip install triton")

from kvtc_vllm.codec.kernels.batches import BasisShape, batches  # isort: skip
from kvtc_vllm.codec.kernels.numeric import products  # isort: skip

ROW = 8192
WORTH = (4 << 20) // ROW
"""Columns of zeros that cost as much as a launch."""


def shared(*shapes: BasisShape) -> list[list[int]]:
    """Numbers of the shapes in each batch."""
    found = batches({(i, "k"): shape for i, shape in enumerate(shapes)})
    for batch in found:
        for group, _ in batch.keys:
            assert batch.shape.width >= shapes[group].width
            assert batch.shape.beyond >= shapes[group].beyond
    return [[group for group, _ in batch.keys] for batch in found]


def test_sections_share_a_product_if_zeros_cost_less_than_a_launch() -> None:
    wide = BasisShape(ROW, 2560)
    assert shared(wide, BasisShape(ROW, 2560 - WORTH), BasisShape(ROW, 2496 - WORTH)) == [
        [0, 1],
        [2],
    ]
    assert shared(BasisShape(ROW, 640), wide) == [[1], [0]]
    assert shared(wide, BasisShape(ROW // 2, 2560)) == [[0], [1]]
    small = [BasisShape(64, width) for width in (64, 640, 1280)]
    assert shared(*small) == [[2, 1, 0]]


def test_what_marked_tokens_have_beyond_has_to_fit_too() -> None:
    assert shared(BasisShape(ROW, 2560, 64), BasisShape(ROW, 2496, 128)) == [[0], [1]]
    assert shared(BasisShape(ROW, 2560, 64), BasisShape(ROW, 2496, 0)) == [[0, 1]]


def test_a_section_without_columns_stays_alone() -> None:
    assert shared(BasisShape(64, 64), BasisShape(64, 0)) == [[0], [1]]


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
def test_a_gpu_is_asked_for_one_product(count: int, out_dtype: torch.dtype) -> None:
    """With operands and results as serving has them; no device computes here."""
    rows = torch.empty(10, 5 + count * 8, dtype=out_dtype, device="meta")
    out = rows[:, 5:].view(10, count, 8).transpose(0, 1)
    a = torch.empty(count, 10, 16, dtype=torch.float16, device="meta")
    b = torch.empty(count, 8, 16, dtype=torch.float16, device="meta").transpose(1, 2)
    with Asked() as asked:
        products(a, b, out)
    assert asked.names == ["mm" if count == 1 else "bmm"]
    assert out.stride() == (8, 5 + count * 8, 1)


class Asked(TorchDispatchMode):
    """Notes what launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
