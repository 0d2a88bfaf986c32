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
    bodies = [(s.start, s.stored_length, s.raw_length, s.place) for s in sections]
    starts, stored, raw, places = np.array(bodies, np.int64).reshape(-1, 4).T
    units = CheckedUnits.of(lengths, counts, starts, stored, raw, data)
    return units.table(np.flatnonzero(units.sound), places), np.flatnonzero(~units.sound).tolist()


@dataclass(frozen=True)
class CheckedUnits:
    """The units of many sections, section after section, and which of the sections are sound.

    int64 [n] by unit, [m] by section.
    """

    raw: Lengths
    stored: Lengths
    offsets: Lengths
    """Where each unit is in the buffer that holds the sections."""
    before: Lengths
    """Raw bytes of its section before it."""
    first: Lengths
    """By section: its first unit."""
    counts: Lengths
    """By section: how many it has."""
    sound: npt.NDArray[np.bool_]
    """By section, see `unit_table`."""

    @classmethod
    def of(
        cls,
        lengths: Lengths,
        counts: Lengths,
        starts: Lengths,
        stored_lengths: Lengths,
        raw_lengths: Lengths,
        data: npt.NDArray[np.uint8],
    ) -> CheckedUnits:
        """lengths: raw and stored of every unit, [n, 2]; the rest by section, see `SectionBody`."""
        raw, stored = lengths.T.copy()
        padded = aligned(stored)
        last = counts.cumsum()
        owner = np.repeat(np.arange(len(counts)), counts)
        before, raw_sums = _within(raw, last - counts, last)
        stored_before, stored_sums = _within(padded, last - counts, last)
        sound = (raw_sums == raw_lengths) & (stored_sums == stored_lengths)
        sound[owner[stored > raw]] = False
        offsets = starts[owner] + stored_before
        checked = np.flatnonzero((padded != stored) & sound[owner])
        gaps, ends = (padded - stored)[checked], (offsets + padded)[checked]
        # Bytes before the end of a unit that are padding in the units with gaps as large.
        for back in range(1, UNIT_ALIGNMENT):
            unclean = (data[ends - back] != 0) & (gaps >= back)
            sound[owner[checked[unclean]]] = False
        return cls(raw, stored, offsets, before, last - counts, counts, sound)

    def table(self, sections: Lengths, places: Lengths) -> UnitTable:
        """Of some sections, by number. places: where the raw bytes of each section belong."""
        counts = self.counts[sections]
        ends = counts.cumsum()
        # The units of each chosen section, one section after the other.
        units = np.arange(int(ends[-1]) if len(ends) else 0)
        units += np.repeat(self.first[sections] - (ends - counts), counts)
        return UnitTable(
            self.raw[units],
            self.stored[units],
            self.offsets[units],
            np.repeat(places[sections], counts) + self.before[units],
        )


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
