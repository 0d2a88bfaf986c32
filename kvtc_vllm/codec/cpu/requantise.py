"""Blobs of codec 2 at the next coarser plan, from their levels alone. Imports numba.

The levels of a blob are halved, which gives those of the plan that is nested in its own (see
`kvtc_vllm.codec.v2.nesting`), and coded as that plan's. No row is made of them: it takes neither
basis nor RoPE. What is decoded is as good as if the chunk had been stored so at once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvtc_vllm.codec.artifact import SectionName
from kvtc_vllm.codec.base import Blob, stored_body
from kvtc_vllm.codec.container import NewSection, Section, SectionKind, build, ratio_of
from kvtc_vllm.codec.cpu.packed_levels import Levels, pack_levels, unpack_levels
from kvtc_vllm.codec.entropy import EncodedSection, EntropyCoder
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.frame import SECTION_NAME
from kvtc_vllm.codec.marks import (
    BEYOND_KIND,
    NOTHING_CODED,
    check_room,
    new_beyond_section,
    no_beyond,
    unpack_marks,
)
from kvtc_vllm.codec.section_coder import CodedSection, read_body
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.nesting import MAX_HALVINGS, halved, nested_ratios
from kvtc_vllm.codec.v2.plan import StepPlan, step_plan

_BEYOND = frozenset(BEYOND_KIND.values())


class Requantiser:
    """Halves blobs of one codec, ratio by ratio. Pure; safe for many threads.

    codec: whose blobs they are; those of its ratio are whole. entropy: with the settings that it
    writes with. floor: highest ratio to end at. Compiles when it is made, for seconds if numba's
    cache is cold. Raises ArtifactError if no plan of a ratio up to `floor` is nested in the
    codec's.
    """

    def __init__(self, codec: Kvtc2Codec, entropy: EntropyCoder, floor: float = math.inf) -> None:
        self._codec = codec
        self._entropy = entropy
        coarser = nested_ratios(codec.artifact)
        ratios = [codec.ratio]
        while len(ratios) <= MAX_HALVINGS:
            lower = coarser.get(ratios[-1])
            if lower is None or lower > floor:
                break
            ratios.append(lower)
        if codec.ratio not in coarser:
            raise ArtifactError(
                f"degrade: no plan of the artifact is nested in that of ratio {codec.ratio:g}; "
                "calibrate with --halvings"
            )
        if len(ratios) == 1:
            raise ArtifactError(
                f"degrade_floor={floor:g}: chunks of ratio {codec.ratio:g} are halved to ratio "
                f"{coarser[codec.ratio]:g}; give no lower one"
            )
        self.ratios = tuple(ratios)
        """Target ratios of whole blobs, of those halved once, and so on."""
        self._warm_up()

    @property
    def most_times(self) -> int:
        """How often a whole blob can be halved."""
        return len(self.ratios) - 1

    def times_halved(self, blob: Blob) -> int:
        """How often a blob was halved; 0 for one of another ratio. Of a verified blob."""
        ratio = ratio_of(blob)
        return self.ratios.index(ratio) if ratio in self.ratios else 0

    def halve(self, blob: Blob, key: bytes = b"") -> bytes:
        """The chunk at the next ratio. key: the name that it is kept under, and stays so.

        Raises ContainerError as decoding the blob would. Raises CodecError "ratio" if there is no
        next one, and "size" if the result is unlike the calibration data.
        """
        info = self._codec.verify(blob, key)
        header, view = info.header, memoryview(blob)
        lower = dict(pairwise(self.ratios)).get(header.ratio)
        if lower is None:
            raise CodecError("ratio", f"a blob of ratio {header.ratio:g} is not halved")
        tokens = header.tokens - header.sinks
        marks: npt.NDArray[np.bool_] | None = None
        made: list[NewSection] = []
        for section, following in zip(info.sections, (*info.sections[1:], None), strict=True):
            name = SECTION_NAME.get(section.kind)
            if name is not None:
                basis = self._codec.artifact.sections[section.group, name]
                plans = step_plan(basis, header.ratio), step_plan(basis, lower)
                levels = _levels(section, view, plans[0], tokens)
                if marks is None:
                    coded = self._coded(levels[: plans[1].rank], plans[1])
                    made.append(_section(section, coded))
                    continue
                assert following is not None
                extra = _beyond(following, view, plans[0], int(marks.sum()))
                of_sinks = np.concatenate((levels[:, marks], extra))
                made += self._with_sinks(section, name, levels, of_sinks, plans[1])
            elif section.kind not in _BEYOND:
                if section.kind == SectionKind.MARKS:
                    bitmap = read_body(section, stored_body(section, view))
                    marks = unpack_marks(bitmap, tokens).numpy()
                made.append(_as_it_is(section, view))
        return build(replace(header, ratio=lower), made)

    def _with_sinks(
        self,
        section: Section,
        name: SectionName,
        levels: Levels,
        of_sinks: Levels,
        coarse: StepPlan,
    ) -> list[NewSection]:
        """A section and what marked tokens have beyond it. of_sinks: all levels of the latter."""
        coded = self._coded(levels[: coarse.rank], coarse)
        beyond = NOTHING_CODED
        if coarse.beyond is not None and of_sinks.shape[1]:
            beyond = self._coded(of_sinks[coarse.rank : coarse.total_rank], coarse.beyond)
        check_room(coarse, levels.shape[1], coded, beyond)
        return [_section(section, coded), new_beyond_section(section.group, name, beyond)]

    def _coded(self, levels: Levels, plan: StepPlan) -> CodedSection:
        """Half of fine levels [<= r, T], those of further columns being 0."""
        halves = np.zeros((plan.rank, levels.shape[1]), np.int32)
        halves[: len(levels)] = halved(levels)
        return plan.store(pack_levels(halves, plan), levels.shape[1], self._entropy)

    def _warm_up(self) -> None:
        """Compile before anything waits for it."""
        for section in self._codec.artifact.sections.values():
            for ratio in self.ratios:
                plan = step_plan(section, ratio)
                levels = np.ones((plan.rank, 1), np.int32)
                unpack_levels(bytearray(b"".join(pack_levels(levels, plan))), plan, 1)


def _levels(section: Section, view: memoryview, plan: StepPlan, tokens: int) -> Levels:
    return unpack_levels(read_body(section, stored_body(section, view)), plan, tokens)


def _beyond(section: Section, view: memoryview, plan: StepPlan, marked: int) -> Levels:
    """Of marked tokens, past the rank: int32 [r', M]."""
    if plan.beyond is None or not marked:
        no_beyond(section)
        return np.zeros((0, marked), np.int32)
    return _levels(section, view, plan.beyond, marked)


def _section(old: Section, coded: CodedSection) -> NewSection:
    kind = SectionKind(old.kind)
    return NewSection(kind, coded.coder_id, old.group, coded.raw_length, coded.encoded)


def _as_it_is(section: Section, view: memoryview) -> NewSection:
    encoded = EncodedSection(section.units, bytes(stored_body(section, view)))
    kind = SectionKind(section.kind)
    return NewSection(kind, section.coder_id, section.group, section.raw_length, encoded)
