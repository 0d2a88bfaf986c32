"""Page orders of the CPU backend: any permutation, and those that loops describe."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.vllm_cache.compat import UnsupportedError
from kvtc_vllm.vllm_cache.cpu_pages import PermutedOrder

TOKENS, SIZE = 8, 6
NUMBERS = torch.arange(TOKENS * SIZE).view(TOKENS, SIZE)
SOURCES = {
    "rows": NUMBERS.flatten(),
    "columns": NUMBERS.T.flatten(),
    "pairs of dims": NUMBERS.view(TOKENS, SIZE // 2, 2).transpose(0, 1).flatten(),
    "pairs of tokens": NUMBERS.view(TOKENS // 2, 2, SIZE).transpose(1, 2).flatten(),
    "both": NUMBERS.view(4, 2, 3, 2).permute(2, 0, 3, 1).flatten(),
    "tokens back to front": NUMBERS.flip(0).flatten(),
    "three levels": NUMBERS.view(2, 2, 2, SIZE).permute(2, 1, 0, 3).flatten(),
    "none": torch.randperm(TOKENS * SIZE, generator=torch.Generator().manual_seed(1)),
}
LOOPS = {"rows": 2, "columns": 2, "pairs of dims": 3, "pairs of tokens": 3, "both": 4}
"""How many describe an order; the others are read through a table."""


def whole(pages: torch.Tensor) -> torch.Tensor:
    return pages


def of_larger(pages: torch.Tensor) -> torch.Tensor:
    """The same pages, as every second head of others."""
    larger = pages.new_zeros((pages.shape[0] + 2, 2 * pages.shape[1], *pages.shape[2:]))
    larger[1:-1, ::2] = pages
    return larger[1:-1, ::2]


def in_turns(pages: torch.Tensor) -> torch.Tensor:
    """The same pages, each not in one piece."""
    return pages.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("place", [whole, of_larger, in_turns])
@pytest.mark.parametrize("values", SOURCES)
@pytest.mark.parametrize("keys", SOURCES)
def test_elements_are_where_the_order_says(keys: str, values: str, place: object) -> None:
    """split takes the element of place f to number source[f]; join puts it back."""
    order = PermutedOrder(TOKENS, SIZE, SOURCES[keys], SOURCES[values])
    pages = torch.randn(3, 2, TOKENS, 2 * SIZE)
    k, v = order.split(place(pages))  # type: ignore[operator]
    halves = pages.view(3, 2, 2, TOKENS * SIZE)
    for i, (found, name) in enumerate(((k, keys), (v, values))):
        assert found.shape == (3, 2, TOKENS, SIZE)
        assert torch.equal(found.flatten(2)[..., SOURCES[name]], halves[:, :, i])
    assert torch.equal(order.join(k, v), pages)


@pytest.mark.parametrize("name", SOURCES)
def test_kernels_get_views_of_two_loops_only(name: str) -> None:
    order = PermutedOrder(TOKENS, SIZE, SOURCES[name], SOURCES["rows"])
    pages = torch.randn(3, 2, TOKENS, 2 * SIZE)
    if LOOPS.get(name) == 2:
        k, v = order.split(pages)
        sides = order.sides([pages])
        assert torch.equal(sides.k.views[0], k)
        assert torch.equal(sides.v.views[0], v)
    else:
        with pytest.raises(UnsupportedError, match="no strides"):
            order.sides([pages])


@pytest.mark.parametrize("name", SOURCES)
def test_orders_of_loops_are_known_as_such(name: str) -> None:
    half = PermutedOrder(TOKENS, SIZE, SOURCES["rows"], SOURCES[name])._halves[1]
    loops = None if half.tokens is None or half.dims is None else (*half.tokens, *half.dims)
    assert (None if loops is None else len(loops)) == LOOPS.get(name)


def test_tokens_in_one_piece_are_not_copied() -> None:
    """Who reads them moves them. Elements that lie apart are put together first."""
    order = PermutedOrder(TOKENS, SIZE, SOURCES["columns"], SOURCES["rows"])
    pages = torch.randn(3, 2, TOKENS, 2 * SIZE)
    k, v = order.split(pages)
    assert k.is_contiguous()
    pages.zero_()
    assert k.any()
    assert not v.any()
