"""Where a chunk starts: as LMCache says, or as the data show.

A chunk's hash chains over everything before it, so one hash has one position. LMCache gives a
serializer the hash alone; with server-driven copies it also publishes an event (MP_TOKENS) that
pairs hashes with token offsets. Events are asynchronous and may be dropped, and engine-driven
copies publish none.

K before RoPE and V hold most of their energy in the artifact's leading basis vectors. Read with a
wrong layout, with another model's artifact or at a wrong position they do not. So a position that
nobody named can be found, and a position or layout that was named wrongly is noticed before
anything lossy is written.

Where K and V share a basis, each is compared with what its own part of the leading vectors spans:
V, which does not change with the position, would blur what K shows.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import Kind, RankArtifact, SectionBasis, SectionName
from kvtc_vllm.codec.transform import centred_rows, tensor_rows, to_coefficients

DEFAULT_CAPACITY = 1 << 18
SAMPLED_TOKENS = 16
"""Rows of a chunk that are looked at."""
LEADING = 64
"""Basis vectors that are looked at."""
SMALLEST = 1e-3
"""Share of the largest singular value below which a direction of a part is rounding."""
SLACK = 0.3
"""A chunk may leave over what the artifact's own probe rows leave over, and this share of the
rest. On the reference model: probe 0.16, chunks 0.11 to 0.19, limit 0.41, wrong position 0.64; keys
of its pairs: probe 0.19, chunks 0.14 to 0.23, limit 0.43, wrong position 0.64."""
MARGIN = 0.1
"""By how much the best position must beat every other one. On the reference model: 0.46; keys of
its pairs: 0.42, where whole pairs have 0.41. On SmolLM2: 0.36 and 0.29."""


class PositionBook:
    """chunk hash -> first position, for the newest `capacity` hashes. Thread-safe."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        self._capacity = capacity
        self._starts: OrderedDict[bytes, int] = OrderedDict()
        self._changed = threading.Condition()
        self._heard = False

    def learn(self, hashes: Sequence[bytes], starts: Sequence[int]) -> None:
        """Note the positions of an event; called on LMCache's event thread."""
        with self._changed:
            self._heard = True
            for chunk_hash, start in zip(hashes, starts, strict=True):
                self._starts[chunk_hash] = start
                self._starts.move_to_end(chunk_hash)
            while len(self._starts) > self._capacity:
                self._starts.popitem(last=False)
            self._changed.notify_all()

    def start_of(self, chunk_hash: bytes, wait: float) -> int | None:
        """First position of a chunk; waits up to `wait` seconds, but only where events come."""
        deadline = time.monotonic() + wait
        with self._changed:
            while chunk_hash not in self._starts:
                left = deadline - time.monotonic()
                if left <= 0 or not self._heard:
                    return None
                self._changed.wait(left)
            return self._starts[chunk_hash]


BOOK = PositionBook()
"""The process's book: one server publishes the events of all its models on one bus."""


@dataclass(frozen=True)
class _Leading:
    """What the leading basis vectors span of K or V of a layer group, orthonormal, and how much
    energy a chunk may have outside them."""

    section: SectionBasis
    limit: float


class Recognition:
    """Tests chunks of one rank against its artifact. Thread-safe.

    probe: the rows kept beside the artifact, for the same layers.
    """

    def __init__(self, artifact: RankArtifact, probe: Probe) -> None:
        self._artifact = artifact
        self._end = min((rope.max_positions for rope in artifact.ropes), default=0)
        self._leading = {
            (group, tensor): leading
            for group, name in artifact.section_keys()
            for tensor, leading in _leading(artifact, probe, group, name).items()
        }

    def recognises(self, k: torch.Tensor, v: torch.Tensor, start: int) -> bool:
        """Whether a chunk looks like this model's, with this first position.

        k: [T, L, H, D] post-RoPE, v: [T, L, H, Dv].
        """
        if start < 0 or (self._artifact.ropes and start + len(k) > self._end):
            return False
        # Not "left > limit": a chunk that holds NaN does not fit either.
        return all(
            self._left_over(k, v, group, tensor, start) <= leading.limit
            for (group, tensor), leading in self._leading.items()
        )

    def find_start(self, k: torch.Tensor, v: torch.Tensor) -> int | None:
        """First position of a chunk, a multiple of its length, or None if that isn't plain.

        All multiples inside the RoPE table are tried on the first layer group with RoPE. A
        model without RoPE codes the same at every position; 0 then keeps sink tokens exact.
        """
        group = self._rotated_group()
        if group is None:
            return 0 if self.recognises(k, v, 0) else None
        tokens = len(k)
        starts = range(0, self._end - tokens + 1, tokens)
        left = [self._left_over(k, v, group, "k", start) for start in starts]
        if not left or not all(map(math.isfinite, left)):
            return None
        order = sorted(range(len(left)), key=left.__getitem__)
        best = starts[order[0]]
        if len(order) > 1 and left[order[1]] - left[order[0]] < MARGIN:
            return None
        return best if self.recognises(k, v, best) else None

    def _rotated_group(self) -> int | None:
        for group, (first, end) in enumerate(self._artifact.geometry.layer_groups):
            if any(index is not None for index in self._artifact.layer_rope[first:end]):
                return group
        return None

    def _left_over(
        self, k: torch.Tensor, v: torch.Tensor, group: int, tensor: Kind, start: int
    ) -> float:
        index = self._sample(len(k))
        cache = (k if tensor == "k" else v)[index]
        rows = tensor_rows(cache, group, tensor, self._artifact, index + start)
        return _left_over(rows, self._leading[group, tensor].section)

    def _sample(self, tokens: int) -> torch.Tensor:
        """Evenly spread places in a chunk, past the sinks, which were not calibrated."""
        first = min(self._artifact.sink_tokens, tokens - 1)
        count = min(SAMPLED_TOKENS, tokens - first)
        return torch.linspace(first, tokens - 1, count).long()


def _leading(
    artifact: RankArtifact, probe: Probe, group: int, name: SectionName
) -> dict[Kind, _Leading]:
    """Of each tensor in a section."""
    first, end = artifact.geometry.layer_groups[group]
    whole = artifact.sections[group, name]
    basis = whole.basis[:, :LEADING].float()
    found: dict[Kind, _Leading] = {}
    for tensor, part in artifact.geometry.row_parts(group, name).items():
        weights = None if whole.weights is None else whole.weights[part]
        own = _orthonormal(basis[part])
        section = SectionBasis(whole.mean[part].float(), own, plans={}, weights=weights)
        rows = (probe.k if tensor == "k" else probe.v)[:, first:end].float().flatten(1)
        left = _left_over(rows, section)
        found[tensor] = _Leading(section, left + SLACK * (1.0 - left))
    return found


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Of what columns float32 [p, n] span: float32 [p, at most n]."""
    vectors, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return vectors[:, sizes > SMALLEST * sizes[0]]


def _left_over(rows: torch.Tensor, section: SectionBasis) -> float:
    """Share of the energy around the mean outside the section's basis vectors: 0 to 1."""
    total = float(centred_rows(rows, section).double().square().sum())
    held = float(to_coefficients(rows, section, section.basis.shape[1]).double().square().sum())
    return 1.0 - held / total if total > 0 else 0.0
