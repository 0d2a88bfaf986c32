"""Samples of memory: the same few words of many tensors, taken again and again and compared.

A word is 8 bytes. Words of a tensor are evenly spread, at an odd distance, so that they meet all
columns of a matrix in turn.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

SPARSE_WORDS = 64
"""Words of a tensor that are compared in a step that stores or loads."""
DENSE_WORDS = 4096
"""The same where a name is made or a reset asks for a check."""
_NOTHING = torch.empty(0, dtype=torch.uint8)


class Sample:
    """Memory at one moment. `matches` may be asked on any thread."""

    def __init__(
        self,
        taken: torch.Tensor,
        reference: torch.Tensor | None,
        point: torch.cuda.Event | None = None,
    ) -> None:
        self._taken = taken
        self._reference = reference
        self._point = point

    def matches(self) -> bool:
        """True if it was as in the reference; on a GPU waits for the sample."""
        if self._reference is None:
            return False
        if self._point is not None:
            self._point.synchronize()
        return torch.equal(self._taken, self._reference)


ALWAYS = Sample(_NOTHING, _NOTHING)
"""Of nothing that could change."""
NEVER = Sample(_NOTHING, None)
"""Of something that has changed already."""


class WordSampler:
    """parts: memory as uint8 [n], views that stay valid; whole words of it are looked at, and all
    of what is shorter than a word.
    """

    def __init__(self, parts: Iterable[torch.Tensor]) -> None:
        self._views: dict[int, list[torch.Tensor]] = {SPARSE_WORDS: [], DENSE_WORDS: []}
        self._short: list[torch.Tensor] = []
        self._references: dict[int, torch.Tensor] = {}
        for part in parts:
            whole = part.numel() // 8 * 8
            if not whole:
                self._short.append(part)
                continue
            for words, views in self._views.items():
                views.append(part[:whole].view(torch.int64)[:: max(1, whole // 8 // words) | 1])

    def refer(self) -> torch.Tensor:
        """Make the present content the reference of later samples; returns its dense sample."""
        for words in self._views:
            self._references[words] = self._take(words).cpu()
        return self._references[DENSE_WORDS]

    def adopt(self, other: WordSampler) -> None:
        """Compare with what `other` compares with."""
        self._references = other._references

    def sample(self, dense: bool = False) -> Sample:
        """The content now. On a GPU ordered after what the current stream was given so far."""
        words = DENSE_WORDS if dense else SPARSE_WORDS
        reference = self._references.get(words)
        taken = self._take(words)
        if not taken.is_cuda:
            return Sample(taken, reference)
        host = torch.empty(taken.shape, dtype=taken.dtype, pin_memory=True)
        host.copy_(taken, non_blocking=True)
        point = torch.cuda.Event()
        point.record()
        return Sample(host, reference, point)

    def _take(self, words: int) -> torch.Tensor:
        """uint8, on the device of the parts."""
        views = self._views[words]
        parts = [torch.cat(views).view(torch.uint8)] if views else []
        return torch.cat([*parts, *self._short]) if parts or self._short else _NOTHING
