"""How a load is cut: by what the host's pinned memory holds, and by what the device's does."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from kvtc_vllm.codec.kernels.chunks import steps
from kvtc_vllm.codec.kernels.payload_coding import StoredPayloads
from kvtc_vllm.codec.kernels.resident import padded_payload
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs


@dataclass(frozen=True)
class LoadPart:
    """Some chunks of a load. host: where their blobs begin in the thread's pinned memory."""

    places: slice
    host: int


@dataclass(frozen=True)
class BegunPart:
    """A part whose blobs the host's threads check and stage. tasks: give whether each is sound."""

    uploads: UploadedBlobs
    tasks: list[Future[list[bool]]]


def load_parts(sizes: Sequence[int], most: int) -> list[LoadPart]:
    """One part if all blobs fit `most` bytes, else such that any two neighbours do.

    While one is decoded the next is checked, in the other half of the memory. sizes: of the blobs.
    A blob of more than half of `most` is a part of its own.
    """
    found = steps(sizes, most if sum(sizes) <= most else most // 2)
    first_half = max((sum(sizes[part]) for part in found[::2]), default=0)
    return [LoadPart(part, number % 2 * first_half) for number, part in enumerate(found)]


def that_fit(
    wave: slice, stored: Mapping[int, StoredPayloads], limits: tuple[int, int]
) -> list[slice]:
    """A wave cut into parts of which payload bytes and marked tokens fit a step's memory."""
    places = range(wave.start, wave.stop)
    whole = [stored[place] for place in places if place in stored]
    if not any(map(operator.gt, total_needs(whole), limits)):
        return [wave]
    none = StoredPayloads(0, np.zeros(0, np.int64))
    found: list[slice] = []
    first, taken = wave.start, (0, 0)
    for place in places:
        own = stored.get(place, none)
        needs = total_needs([own])
        taken = taken[0] + needs[0], taken[1] + needs[1]
        if place > first and any(map(operator.gt, taken, limits)):
            found.append(slice(first, place))
            first, taken = place, needs
    return [*found, slice(first, wave.stop)]


def total_needs(stored: Sequence[StoredPayloads]) -> tuple[int, int]:
    """Payload bytes and marked tokens of blobs in a step of a load."""
    if not stored:
        return 0, 0
    lengths = np.concatenate([own.lengths for own in stored])
    marks = np.concatenate([own.marks for own in stored])
    return int(padded_payload(lengths).sum()), int(marks.sum())
