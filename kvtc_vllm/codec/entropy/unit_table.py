"""The units of many sections as arrays, checked: a load has thousands of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.entropy.base import UNIT_ALIGNMENT, Unit, aligned, unit_lengths
from kvtc_vllm.codec.errors import ContainerError

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SectionBody:
    """One section in a buffer."""

    units: Sequence[Unit]
    start: int
    """Where its stored bytes begin in the buffer."""
    stored_length: int
    """Bytes stored, the units' padding included."""
    raw_length: int
    """Bytes that they decode to."""
    place: int = 0
    """Where these belong."""


@dataclass(frozen=True)
class UnitTable:
    """Units of several sections; int64 [n] each, in bytes."""

    raw: Lengths
    """Lengths before coding."""
    stored: Lengths
    """Lengths in the buffer that holds the sections, without padding."""
    offsets: Lengths
    """Where each is in that buffer, a multiple of `UNIT_ALIGNMENT`."""
    places: Lengths
    """Where the raw bytes belong."""


def unit_table(
    sections: Sequence[SectionBody], data: npt.NDArray[np.uint8]
) -> tuple[UnitTable, list[int]]:
    """Table of all units of the sections that are sound, and the numbers of those that are not.

    Sound: the units tile the stored bytes with zero padding, give exactly the raw length, and
    none is larger stored than raw. data: the buffer that holds the sections.
    """
    counts = np.array([len(section.units) for section in sections], np.int64)
    none = np.empty((0, 2), np.int64)
    lengths = np.concatenate([none, *(unit_lengths(section.units) for section in sections)])
    raw, stored = lengths.T.copy()
    padded = aligned(stored)
    last = counts.cumsum()
    owner = np.repeat(np.arange(len(sections)), counts)
    raw_before, raw_sums = _within(raw, last - counts, last)
    stored_before, stored_sums = _within(padded, last - counts, last)
    raw_lengths = np.array([section.raw_length for section in sections], np.int64)
    stored_lengths = np.array([section.stored_length for section in sections], np.int64)
    starts = np.array([section.start for section in sections], np.int64)
    places = np.array([section.place for section in sections], np.int64)
    sound = (raw_sums == raw_lengths) & (stored_sums == stored_lengths)
    sound[owner[stored > raw]] = False
    table = UnitTable(
        raw,
        stored,
        starts[owner] + stored_before,
        places[owner] + raw_before,
    )
    for gap in range(UNIT_ALIGNMENT - 1):
        checked = np.flatnonzero(sound[owner] & (padded - stored > gap))
        sound[owner[checked[data[table.offsets[checked] + stored[checked] + gap] != 0]]] = False
    kept = sound[owner]
    table = UnitTable(raw[kept], stored[kept], table.offsets[kept], table.places[kept])
    return table, np.flatnonzero(~sound).tolist()


def checked_table(units: Sequence[Unit], body: memoryview, raw_length: int) -> UnitTable:
    """Table of one section. Raises ContainerError("entropy") if it is not sound."""
    section = SectionBody(units, 0, len(body), raw_length)
    table, unsound = unit_table([section], np.frombuffer(body, np.uint8))
    if unsound:
        raise unsound_units(section)
    return table


def unsound_units(section: SectionBody) -> ContainerError:
    """The error for a section whose units do not fit it."""
    return ContainerError(
        "entropy",
        f"{len(section.units)} units do not tile {section.stored_length} stored bytes "
        f"and give {section.raw_length}",
    )


def _within(sizes: Lengths, first: Lengths, last: Lengths) -> tuple[Lengths, Lengths]:
    """Of sizes cut into sections [first, last): those before each in its section, and sums."""
    ends = np.concatenate((np.zeros(1, np.int64), sizes.cumsum()))
    return ends[:-1] - np.repeat(ends[first], last - first), ends[last] - ends[first]
