"""Blobs of codec 2 as what they add to others: the same levels, from fewer bytes. Imports numba.

A *difference* is a blob less what can be told from *sources*, other blobs of the artifact in which
the same tokens occur. It gives back the very bytes of the blob, or nothing: sources are known by
their checksums and the result by its own. So nothing that is decoded depends on whether a chunk was
kept as a difference, and a wrong source is no danger.

It never leaves the process that made it, so its layout is no part of FORMAT.md: the parts of
`_HEAD`; checksums of the sources; runs; header and section table of the blob; of every section that
holds no levels unit table and padded body; of every other one u32 with the length of what
`level_coder` writes, and that; checksum of all before.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    ContainerInfo,
    Section,
    SectionKind,
    checksum,
    parse,
)
from kvtc_vllm.codec.cpu.level_coder import (
    NO_SOURCE,
    get_levels,
    new_model,
    put_levels,
    room_of_column,
)
from kvtc_vllm.codec.cpu.packed_levels import Levels, pack_levels, take_tokens, unpack_levels
from kvtc_vllm.codec.cpu.rows import Integers
from kvtc_vllm.codec.entropy import (
    UNIT_BYTES,
    EntropyCoder,
    Unit,
    UnitList,
    aligned,
    padded,
    unit_lengths,
)
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.frame import SECTION_NAME
from kvtc_vllm.codec.marks import unpack_marks
from kvtc_vllm.codec.section_coder import read_body
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

Blob = bytes | bytearray | memoryview
Run = tuple[int, int, int, int]
"""Token of the chunk, number of the source, token of the source, tokens: where they are alike."""
_HEAD = struct.Struct("<HHI16s")
"""Sources, runs, bytes of header and section table, checksum of the blob."""
_RUN = struct.Struct("<HHHH")
_LENGTH = struct.Struct("<I")
_ENTRY_BYTES = 16
"""Of the section table."""


@dataclass(frozen=True)
class _Opened:
    """A blob: its parts, which of its coded tokens are marked, and the plan of each section."""

    info: ContainerInfo
    blob: memoryview
    marks: npt.NDArray[np.bool_]
    plans: list[StepPlan | None]

    @property
    def coded(self) -> int:
        """Tokens that have levels."""
        return self.info.header.tokens - self.info.header.sinks

    def levels(self, kind: int, group: int) -> Levels:
        """Of the section of this kind and layer group: int32 [r, N]. Raises ContainerError."""
        for plan, section in zip(self.plans, self.info.sections, strict=True):
            if plan is not None and (section.kind, section.group) == (kind, group):
                return unpack_levels(read_body(section, self.body(section)), plan, self.coded)
        raise ContainerError("geometry", f"no levels of kind {kind} in layer group {group}")

    def body(self, section: Section) -> memoryview:
        """As it is stored, without padding."""
        return self.blob[section.offset : section.offset + section.stored_length]


class DeltaCoder:
    """Differences between blobs of one artifact. Pure; safe for many threads.

    artifact: of codec 2. entropy: with the settings that the blobs were written with. Compiles
    when it is made, for seconds if numba's cache is cold.
    """

    def __init__(self, artifact: RankArtifact, entropy: EntropyCoder) -> None:
        self._artifact = artifact
        self._entropy = entropy
        self._ratios = frozenset(artifact.ratios())
        self._warm_up()

    def encode(
        self, blob: Blob, sources: Sequence[Blob], runs: Sequence[Run], most: int
    ) -> bytes | None:
        """A difference of at most `most` bytes; None if there is none that gives the blob back."""
        try:
            new = self._open(blob)
            alike = [self._open(source) for source in sources]
            sinks = new.info.header.sinks
            if any(source.info.header.ratio != new.info.header.ratio for source in alike):
                return None
            places = [_alike(new.marks, sinks, alike[run[1]], run) for run in runs]
            parts = [
                _HEAD.pack(len(sources), len(runs), _head_bytes(new.info), _checksum(blob)),
                *map(_checksum, sources),
                *(_RUN.pack(*run) for run in runs),
                bytes(new.blob[: _head_bytes(new.info)]),
            ]
            room = most - sum(map(len, parts))
            for plan, section in zip(new.plans, new.info.sections, strict=True):
                part_of = (section.kind, section.group)
                if plan is None:
                    body = bytes(new.body(section))
                    part = _table(section.units) + padded(body)
                else:
                    levels = new.levels(*part_of)
                    if self._stored(plan, levels) != (
                        _table(section.units),
                        bytes(new.body(section)),
                    ):
                        return None
                    predicted = _predicted(levels.shape, alike, part_of, runs, places)
                    coded = _put(plan, levels, predicted, max(0, room))
                    if coded is None:
                        return None
                    part = _LENGTH.pack(len(coded)) + coded
                parts.append(part)
                room -= len(part)
        except (CodecError, struct.error):
            return None
        if room < CHECKSUM_BYTES:
            return None
        content = b"".join(parts)
        return content + checksum(content)

    def decode(self, difference: Blob, sources: Sequence[Blob]) -> bytes:
        """The blob. sources: those that `encode` was given, in order.

        Raises ContainerError: "checksum" for a difference that was altered or gives another blob,
        "fingerprint" for other sources, or as reading a source does.
        """
        data = memoryview(difference)[:-CHECKSUM_BYTES]
        if checksum(data) != bytes(difference[-CHECKSUM_BYTES:]):
            raise ContainerError("checksum", "the difference was altered")
        count, num_runs, head_bytes, expected = _HEAD.unpack_from(data)
        at = _HEAD.size
        wanted = [bytes(data[at + 16 * n : at + 16 * n + 16]) for n in range(count)]
        if wanted != list(map(_checksum, sources)):
            raise ContainerError("fingerprint", "the sources are not those of the difference")
        at += 16 * count
        runs = [_RUN.unpack_from(data, at + _RUN.size * n) for n in range(num_runs)]
        at += _RUN.size * num_runs
        head = bytes(data[at : at + head_bytes])
        at += head_bytes
        rows = [
            struct.unpack_from("<BBHIII", head, HEADER_BYTES + _ENTRY_BYTES * n)
            for n in range((head_bytes - HEADER_BYTES) // _ENTRY_BYTES)
        ]
        alike = [self._open(source) for source in sources]
        (tokens,), sinks = struct.unpack_from("<I", head, 24), head[11]
        marks = np.zeros(tokens - sinks, np.bool_)
        places: list[tuple[Integers, Integers]] | None = None
        tables: list[bytes] = []
        bodies: list[bytes] = []
        for kind, _, group, units, _, stored in rows:
            plan = self._plan(kind, group, alike[0].info.header.ratio)
            if plan is None:
                end = at + UNIT_BYTES * units
                tables.append(bytes(data[at:end]))
                bodies.append(bytes(data[end : end + aligned(stored)]))
                if kind == SectionKind.MARKS:
                    marks = _marks(bodies[-1][:stored], tokens - sinks)
                at = end + aligned(stored)
                continue
            if places is None:  # by now marks are known: they come before all levels
                places = [_alike(marks, sinks, alike[run[1]], run) for run in runs]
            (length,) = _LENGTH.unpack_from(data, at)
            coded = np.frombuffer(data[at + _LENGTH.size : at + _LENGTH.size + length], np.uint8)
            at += _LENGTH.size + length
            levels = np.zeros((plan.rank, tokens - sinks), np.int32)
            predicted = _predicted(levels.shape, alike, (kind, group), runs, places)
            model = new_model(len(plan.widths))
            if get_levels(coded, predicted, _classes(plan), model, levels) < 0:
                raise ContainerError("bounds", "the difference holds what is no level")
            table, body = self._stored(plan, levels)
            tables.append(table)
            bodies.append(padded(body))
        content = b"".join((head, *tables, *bodies))
        if checksum(content) != expected:
            raise ContainerError("checksum", "the difference does not give its blob back")
        return content + bytes(expected)

    def _open(self, blob: Blob) -> _Opened:
        """Raises ContainerError for what is not of the artifact."""
        view = memoryview(blob)
        info = parse(view)
        header = info.header
        if header.codec_id != Kvtc2Codec.codec_id:
            raise ContainerError("version", f"codec {header.codec_id} has no differences")
        if header.artifact != self._artifact.fingerprint or header.ratio not in self._ratios:
            raise ContainerError("fingerprint", "written with another artifact or plan")
        coded = header.tokens - header.sinks
        marks = np.zeros(coded, np.bool_)
        plans: list[StepPlan | None] = []
        for section in info.sections:
            plans.append(self._plan(section.kind, section.group, header.ratio))
            if section.kind == SectionKind.MARKS:
                stored = view[section.offset : section.offset + section.stored_length]
                marks = _marks(bytes(stored), coded)
        return _Opened(info, view, marks, plans)

    def _plan(self, kind: int, group: int, ratio: float) -> StepPlan | None:
        """Of what has levels; None for all else. Raises ContainerError for a section of others."""
        name = SECTION_NAME.get(kind)
        if name is None:
            return None
        section = self._artifact.sections.get((group, name))
        if section is None:
            raise ContainerError("geometry", f"the artifact has no {name} in layer group {group}")
        return step_plan(section, ratio)

    def _warm_up(self) -> None:
        """Compile before anything waits for it."""
        for section in self._artifact.sections.values():
            plan = next(iter(section.plans.values()))
            assert isinstance(plan, StepPlan)
            if plan.rank:
                levels = np.ones((plan.rank, 1), np.int32)
                payload = bytearray(b"".join(pack_levels(levels, plan)))
                found = unpack_levels(payload, plan, 1)
                take_tokens(levels, np.zeros(1, np.int64), found, np.zeros(1, np.int64))
                coded = _put(plan, levels, found, levels.size * 8)
                assert coded is not None
                data, model = np.frombuffer(coded, np.uint8), new_model(len(plan.widths))
                get_levels(data, found, _classes(plan), model, levels)

    def _stored(self, plan: StepPlan, levels: Levels) -> tuple[bytes, bytes]:
        """Unit table and body of a section of these levels."""
        encoded = self._entropy.encode(pack_levels(levels, plan))
        return _table(encoded.units), encoded.body


def _checksum(blob: Blob) -> bytes:
    """As the blob says, not computed."""
    return bytes(blob[-CHECKSUM_BYTES:])


def _head_bytes(info: ContainerInfo) -> int:
    return HEADER_BYTES + _ENTRY_BYTES * len(info.sections)


def _table(units: Sequence[Unit]) -> bytes:
    listed = units if isinstance(units, UnitList) else UnitList.of(unit_lengths(units))
    return bytes(listed.table)


def _marks(bitmap: bytes, coded: int) -> npt.NDArray[np.bool_]:
    return unpack_marks(bitmap, coded).numpy()


def _alike(
    marks: npt.NDArray[np.bool_], sinks: int, source: _Opened, run: Run
) -> tuple[Integers, Integers]:
    """Coded tokens of a run and of its source, without those that differ in being marked."""
    token, _, source_token, length = run
    steps = np.arange(length)
    own, other = token - sinks + steps, source_token - source.info.header.sinks + steps
    if token + length > len(marks) + sinks or source_token + length > source.info.header.tokens:
        raise ContainerError("bounds", f"{length} tokens from {token} are not in both blobs")
    coded = (own >= 0) & (other >= 0)
    own, other = own[coded], other[coded]
    same = marks[own] == source.marks[other]
    return own[same], other[same]


def _predicted(
    shape: tuple[int, ...],
    sources: Sequence[_Opened],
    part_of: tuple[int, int],
    runs: Sequence[Run],
    places: Sequence[tuple[Integers, Integers]],
) -> Levels:
    """Levels int32 [r, N] of the source's tokens, `NO_SOURCE` where there is none.

    part_of: kind and layer group of the section.
    """
    found = np.full(shape, NO_SOURCE, np.int32)
    levels = [source.levels(*part_of) for source in sources]
    for (_, source, _, _), (own, other) in zip(runs, places, strict=True):
        take_tokens(levels[source], other, found, own)
    return found


def _put(plan: StepPlan, levels: Levels, predicted: Levels, most: int) -> bytes | None:
    """At most so many bytes; None if it takes more."""
    out = np.empty(most + room_of_column(levels.shape[1]), np.uint8)
    taken = put_levels(levels, predicted, _classes(plan), new_model(len(plan.widths)), out)
    return None if taken < 0 else out[:taken].tobytes()


def _classes(plan: StepPlan) -> Integers:
    return plan.classes.numpy().astype(np.int64)
