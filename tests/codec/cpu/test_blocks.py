"""Products of a basis in parts: the same as of any matrix, with fewer multiplications."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.cpu.blocks import MOST_BLOCKS, RUN, blocks_of
from kvtc_vllm.codec.cpu.products import Float32Product, Int8Product, Product, has_int8_products

PARTS, OF_ALL, OF_EACH = 3, 10, 21
FEATURES = 2 * PARTS * RUN
needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="this CPU saturates int8 products")


@pytest.fixture(scope="module")
def basis() -> torch.Tensor:
    """K of three parts, then V of them; columns in no order. A single 0 among others is chance."""
    drawn = torch.randn(
        FEATURES, OF_ALL + PARTS * OF_EACH, generator=torch.Generator().manual_seed(0)
    )
    part = torch.arange(FEATURES) // RUN % PARTS
    for i in range(PARTS):
        columns = slice(OF_ALL + i * OF_EACH, OF_ALL + (i + 1) * OF_EACH)
        drawn[part != i, columns] = 0
    drawn[::7, :OF_ALL] = 0
    return drawn[:, torch.randperm(drawn.shape[1], generator=torch.Generator().manual_seed(1))]


def size(matrix: torch.Tensor, elements: int) -> int:
    return sum(block.size for block in blocks_of(matrix, elements))


def test_what_is_not_zero_is_multiplied(basis: torch.Tensor) -> None:
    least = FEATURES * OF_ALL + FEATURES // PARTS * PARTS * OF_EACH
    assert size(basis, 0) == size(basis.T, 1) == least
    shifted = basis.roll(RUN // 2, dims=0)
    assert least < size(shifted, 0) < basis.numel()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda matrix, elements: Float32Product(matrix, elements),
        pytest.param(lambda matrix, elements: Int8Product(matrix, elements), marks=needs_int8),
        pytest.param(
            lambda matrix, elements: Int8Product(matrix, elements, 5 * elements), marks=needs_int8
        ),
    ],
    ids=["float32", "int8", "leading"],
)
@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("shift", [0, RUN // 2])
def test_products(wrap: object, elements: int, shift: int, basis: torch.Tensor) -> None:
    matrix = basis.roll(shift, dims=0)
    matrix = matrix if elements == 0 else matrix.T.contiguous()
    rows = torch.randn(9, len(matrix), generator=torch.Generator().manual_seed(2))
    product: Product = wrap(matrix, elements)  # type: ignore[operator]
    operand = product.operand(rows.numpy())
    found = product.of(operand) * torch.from_numpy(operand.factors)[:, None]
    wanted = rows @ matrix
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 3e-4
    if isinstance(product, Float32Product):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        assert product.nbytes == 4 * size(matrix, elements)
    assert product.nbytes < 4 * matrix.numel()


@pytest.mark.parametrize("elements", [0, 1])
def test_a_matrix_of_no_parts_is_one_block(elements: int) -> None:
    drawn = torch.randn(5 * RUN - 3, 40, generator=torch.Generator().manual_seed(0))
    some = drawn.clone()
    some[:RUN, :20] = 0
    of_many = torch.zeros((MOST_BLOCKS + 1) * RUN, MOST_BLOCKS + 1)
    for i in range(MOST_BLOCKS + 1):
        of_many[i * RUN :][:RUN, i] = 1
    for matrix in (drawn, some, of_many, drawn[:, :0]):
        own = matrix if elements == 0 else matrix.T
        assert [block.size for block in blocks_of(own, elements)] == [matrix.numel()]


def test_elements_that_no_column_has(basis: torch.Tensor) -> None:
    """They are 0 when restored, and are not read when projected."""
    part = basis[:, (basis[RUN:] == 0).all(dim=0) | (basis[:RUN] == 0).all(dim=0)]
    lone = torch.where(torch.arange(FEATURES)[:, None] < RUN, part, 0.0)
    rows = torch.randn(4, FEATURES)
    for matrix, elements in ((lone, 0), (lone.T, 1)):
        own = rows[:, : len(matrix)]
        product = Float32Product(matrix, elements)
        torch.testing.assert_close(product.of(product.operand(own.numpy())), own @ matrix)
