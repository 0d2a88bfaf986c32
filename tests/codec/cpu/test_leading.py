"""int8 products for plans of small error, against products of float32."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.cpu.leading import BandedProduct, DeflatedProduct
from kvtc_vllm.codec.cpu.products import Int8Product, Product, has_int8_products

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="this CPU saturates int8 products")
TOKENS, FEATURES, RANK, LEADING = 40, 384, 320, 16


@pytest.fixture(scope="module")
def coefficients() -> torch.Tensor:
    """By a power law, as a fit leaves them: the first few have most of the energy."""
    drawn = torch.randn(TOKENS, RANK, generator=torch.Generator().manual_seed(0))
    return drawn / torch.arange(1, RANK + 1)


@pytest.fixture(scope="module")
def basis() -> torch.Tensor:
    """Orthonormal but for rounding to float16."""
    drawn = torch.randn(FEATURES, RANK, generator=torch.Generator().manual_seed(1))
    return torch.linalg.qr(drawn).Q.half().float()


def error(product: Product, rows: torch.Tensor, wanted: torch.Tensor) -> float:
    operand = product.operand(rows.numpy())
    found = product.of(operand) * torch.from_numpy(operand.factors)[:, None]
    return float((found - wanted).square().sum() / wanted.square().sum())


def test_rows_without_their_leading_part(coefficients: torch.Tensor, basis: torch.Tensor) -> None:
    rows = coefficients @ basis.T
    wanted = rows @ basis
    leading = DeflatedProduct(basis, basis[:, :LEADING])
    assert error(leading, rows, wanted) < error(Int8Product(basis, 0), rows, wanted) / 3


def test_a_basis_that_is_not_orthonormal(coefficients: torch.Tensor, basis: torch.Tensor) -> None:
    """What the leading columns have of the others is taken back exactly."""
    skewed = basis + 0.2 * basis.roll(1, dims=1)
    rows = coefficients @ basis.T
    assert error(DeflatedProduct(skewed, skewed[:, :LEADING]), rows, rows @ skewed) < 1e-4


def test_leading_columns_may_be_another_matrix_s(
    coefficients: torch.Tensor, basis: torch.Tensor
) -> None:
    """As for what marked tokens have beyond the rank."""
    rows = coefficients @ basis.T
    own = basis[:, RANK // 2 :]
    wanted = rows @ own
    beyond = DeflatedProduct(own, basis[:, :LEADING])
    assert error(beyond, rows, wanted) < error(Int8Product(own, 0), rows, wanted) / 3


@pytest.mark.parametrize("leading", [0, 4, 100])
def test_bands_of_columns(coefficients: torch.Tensor, basis: torch.Tensor, leading: int) -> None:
    """Without leading columns there is one band; with many there is no second."""
    wanted = coefficients @ basis.T
    banded = BandedProduct(basis.T, leading)
    plain = Int8Product(basis.T, 1, leading)
    limit = error(plain, coefficients, wanted)
    found = error(banded, coefficients, wanted)
    assert found < limit / 2 if leading == 4 else found < 1.5 * limit + 1e-9


def test_some_rows_of_an_operand(coefficients: torch.Tensor, basis: torch.Tensor) -> None:
    rows = (coefficients @ basis.T).numpy()
    product = DeflatedProduct(basis, basis[:, :LEADING])
    part = product.of(product.operand(rows).part(slice(3, 9)))
    torch.testing.assert_close(part, product.of(product.operand(rows))[3:9])
