"""Blobs that are what this codec would have written, and their tables as arrays.

`ChunkCodec._verified` says what is wrong with a blob. For the many that are right, and written as
we write, comparing their head with the expected one is enough and takes a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.base import Blob, ExpectedSection
from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    ContainerInfo,
    Header,
    Section,
    SectionEntry,
    SectionTables,
    build_entry,
    build_header,
    checksum,
    headers_with,
    section_tables,
)
from kvtc_vllm.codec.entropy import DEFLATE, UNIT_ALIGNMENT, UNIT_BYTES, UnitList, aligned

_ENTRY = SectionTables.row_dtype().itemsize


@dataclass(frozen=True)
class VerifiedBlob:
    """A blob whose checksum, header and section table are right. Its bodies are not decoded yet."""

    view: memoryview
    sinks: int
    """Exact leading tokens. Their section is the first, if there are any."""
    tables: SectionTables

    @classmethod
    def of(cls, blob: Blob, info: ContainerInfo) -> VerifiedBlob:
        """info: what `parse` made of the blob."""
        view = memoryview(blob)
        return cls(view, info.header.sinks, section_tables(view, len(info.sections)))

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where the body of each section begins in the blob."""
        padded = aligned(self.tables.sections["stored_length"].astype(np.int64))
        starts: npt.NDArray[np.int64] = padded.cumsum() - padded + self.tables.body
        return starts

    def section(self, number: int) -> Section:
        """One of its sections."""
        row = self.tables.sections[number]
        first = int(self.tables.sections["units"][:number].sum()) * UNIT_BYTES
        return Section(
            kind=int(row["kind"]),
            coder_id=int(row["coder_id"]),
            group=int(row["group"]),
            raw_length=int(row["raw_length"]),
            offset=int(self.offsets[number]),
            stored_length=int(row["stored_length"]),
            units=UnitList(self.tables.units[first : first + int(row["units"]) * UNIT_BYTES]),
        )


def has_checksum(blob: Blob) -> bool:
    """Whether a blob ends with the checksum of its contents. Other Python threads run meanwhile."""
    view = memoryview(blob)
    end = len(view) - CHECKSUM_BYTES
    return end >= 0 and checksum(view[:end]) == view[end:]


@dataclass(frozen=True)
class ExpectedHead:
    """What does not differ from blob to blob in header and section table of ours.

    Sections are coded by DEFLATE, if they may be; those that may be empty are raw if they are.
    """

    header: bytes
    """Of any of the blobs, see `container.header_with`."""
    sinks: int
    """Exact leading tokens of each blob."""
    entries: npt.NDArray[np.uint8]
    """Section table with zeros for what differs, uint8 [sections, entry bytes]."""
    fixed: npt.NDArray[np.uint8]
    """255 where `entries` counts, 0 elsewhere."""
    least: npt.NDArray[np.int64]
    """Raw bytes of each section, at least; and `most`, at most."""
    most: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sections: list[ExpectedSection], header: Header) -> ExpectedHead:
        """Of the sections that a blob must have. header: of any such blob."""
        least = [section.raw_length for section in sections]
        most = [s.raw_length if s.most_raw_length is None else s.most_raw_length for s in sections]
        varies = [a != b for a, b in zip(least, most, strict=True)]

        def table(any32: int, any8: int) -> npt.NDArray[np.uint8]:
            """any32, any8: what fields of that size have that may be anything."""
            entries = [
                SectionEntry(
                    s.kind,
                    _coder_of(s) if s.raw_length else any8,
                    s.group,
                    any32,
                    any32 if varied else s.raw_length,
                    any32,
                )
                for s, varied in zip(sections, varies, strict=True)
            ]
            joined = b"".join(map(build_entry, entries))
            return np.frombuffer(joined, np.uint8).reshape(-1, _ENTRY)

        entries = table(0, 0)
        fixed = ~(entries ^ table(0xFFFFFFFF, 0xFF))
        whole = build_header(header, len(sections))
        bounds = np.array(least, np.int64), np.array(most, np.int64)
        return cls(whole, header.sinks, entries, fixed, *bounds)

    def match(
        self, blobs: Sequence[Blob], names: Sequence[tuple[int, bytes]]
    ) -> list[VerifiedBlob | None]:
        """The tables of each blob if it is as we write it. None: who knows.

        Blobs may be anything: their checksums need not be known yet. names: first position and
        identity that each must have. All at once, because a look at one costs as many calls of
        numpy as a look at all.
        """
        views = [memoryview(blob) for blob in blobs]
        count = len(self.entries)
        end = HEADER_BYTES + count * _ENTRY
        found: list[VerifiedBlob | None] = [None] * len(views)
        likely = [i for i, view in enumerate(views) if len(view) >= end + CHECKSUM_BYTES]
        if not likely:
            return found
        # As bytes: numpy takes longer to stack as many small arrays.
        joined = b"".join([views[place][:end] for place in likely])
        heads = np.frombuffer(joined, np.uint8).reshape(len(likely), end)
        headers = headers_with(self.header, [names[place] for place in likely])
        tables = heads[:, HEADER_BYTES:].copy()
        entries = tables.reshape(len(likely), count, _ENTRY)
        rows = tables.view(SectionTables.row_dtype())
        raw, stored, units = (
            rows[name].astype(np.int64) for name in ("raw_length", "stored_length", "units")
        )
        coders = rows["coder_id"]
        bodies = end + UNIT_BYTES * units.sum(1)
        lengths = np.array([len(views[place]) for place in likely], np.int64)
        right = (
            ((entries & self.fixed) == self.entries).all(2)
            & ((coders == DEFLATE.coder_id) | (self.fixed[:, 1] == 255) | (raw == 0))
            & (raw >= self.least)
            & (raw <= self.most)
            & (coders <= DEFLATE.coder_id)
            # Sections of ours need no padding: their last unit has its own.
            & (stored % UNIT_ALIGNMENT == 0)
            & (units <= raw)
        ).all(1)
        right &= (heads[:, :HEADER_BYTES] == headers).all(1)
        right &= bodies + stored.sum(1) + CHECKSUM_BYTES == lengths
        for number in np.flatnonzero(right).tolist():
            place, body = likely[number], int(bodies[number])
            view = views[place]
            own = SectionTables(rows[number], view[end:body], body)
            found[place] = VerifiedBlob(view, self.sinks, own)
        return found


def _coder_of(section: ExpectedSection) -> int:
    """The number of the entropy coder that we code such a section with."""
    return DEFLATE.coder_id if DEFLATE.coder_id in section.coder_ids else min(section.coder_ids)
