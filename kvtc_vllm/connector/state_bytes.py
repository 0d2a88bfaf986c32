"""The bytes of a recurrent layer's states in the order in which they are stored.

A page holds several states of their own element types. Each is stored as byte planes: the first
bytes of all elements, then the second, and so on. Signs and exponents are alike from element to
element, so their planes compress, and those of the lowest bits are stored. With rounding, float32
is kept as bfloat16, to nearest even; other types are bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_ROUNDED = torch.bfloat16


@dataclass(frozen=True)
class StateBytes:
    """parts: elements and type of each state, in the order of the page. rounds: see the module."""

    parts: tuple[tuple[int, torch.dtype], ...]
    rounds: bool = False

    @property
    def page_bytes(self) -> int:
        """Of all states, as the engine has them."""
        return sum(count * dtype.itemsize for count, dtype in self.parts)

    @property
    def stored_bytes(self) -> int:
        """Of all states, as they are stored."""
        return sum(count * self._kept(dtype).itemsize for count, dtype in self.parts)

    def pack(self, pages: torch.Tensor) -> torch.Tensor:
        """uint8 [L, page_bytes] -> uint8 [L, stored_bytes]; on any thread."""
        return torch.cat(list(self._planes(pages)), dim=1)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack`, but for what rounding has changed."""
        layers, first, pages = len(stored), 0, []
        for count, dtype in self.parts:
            kept = self._kept(dtype)
            end = first + count * kept.itemsize
            planes = stored[:, first:end].view(layers, kept.itemsize, count)
            elements = planes.transpose(1, 2).contiguous().view(kept).view(layers, count)
            pages.append(elements.to(dtype).view(torch.uint8))
            first = end
        return torch.cat(pages, dim=1)

    def _planes(self, pages: torch.Tensor) -> Iterator[torch.Tensor]:
        first = 0
        for count, dtype in self.parts:
            kept = self._kept(dtype)
            end = first + count * dtype.itemsize
            elements = pages[:, first:end].contiguous().view(dtype).to(kept)
            planes = elements.view(torch.uint8).view(len(pages), count, kept.itemsize)
            yield planes.transpose(1, 2).flatten(1)
            first = end

    def _kept(self, dtype: torch.dtype) -> torch.dtype:
        return _ROUNDED if self.rounds and dtype == torch.float32 else dtype
