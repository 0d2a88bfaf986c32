"""What every transform codec does: the frame around its section coders.

The oldest tokens of a sequence, the sinks, are stored exactly. All others are rows of layer
groups: keys lose their rotation, the mean is subtracted, the rest is projected on a basis, and
the coefficients go to the section coders of the artifact. What those make of them is the only
thing that distinguishes one transform codec from another.

Source: KVTC, arXiv 2511.01815, sections 3.1 and 3.2. What this project adds or
decides where the paper is silent is in FORMAT.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import ClassVar

import torch

from kvtc_vllm.codec.artifact import (
    PAIRED,
    Geometry,
    Kind,
    RankArtifact,
    SectionBasis,
    SectionName,
)
from kvtc_vllm.codec.artifact_check import check_artifact
from kvtc_vllm.codec.base import (
    ChunkCodec,
    DecodedGroup,
    ExpectedSection,
    read_section,
    stored_body,
)
from kvtc_vllm.codec.container import (
    ALL_LAYERS,
    MAX_POSITION,
    NO_FINGERPRINT,
    ContainerInfo,
    Header,
    NewSection,
    Section,
    SectionKind,
    build,
    container_bytes,
)
from kvtc_vllm.codec.entropy import RAW, DeflateCoder, max_stored_bytes
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.codec.marks import (
    BEYOND_KIND,
    NOTHING_CODED,
    check_room,
    marks_length,
    new_beyond_section,
    no_beyond,
    pack_marks,
    unpack_marks,
)
from kvtc_vllm.codec.section_coder import CodedSection, SectionCoder
from kvtc_vllm.codec.shuffle import shuffle, unshuffle
from kvtc_vllm.codec.transform import (
    chunk_rows,
    from_coefficients,
    layer_scales,
    magnitude,
    rows_to_cache,
    to_coefficients,
)

NON_FINITE = "non-finite: the chunk holds NaN or infinity"
_LENGTHS = 64  # kinds of chunks, by tokens and sinks, whose sections are remembered
SECTION_KIND: dict[SectionName, SectionKind] = {
    "k": SectionKind.CODED_K,
    "v": SectionKind.CODED_V,
    "kv": SectionKind.CODED_PAIR,
}
SECTION_NAME: dict[int, SectionName] = {kind: name for name, kind in SECTION_KIND.items()}


class TransformCodec(ChunkCodec):
    """Codes chunks with one artifact at one of its target ratios.

    Blobs written at any other ratio of the same artifact decode as well.
    deflate_level: 0..3, see `DeflateCoder`. operand: type in which bases stay on the device.
    Raises ArtifactError if the artifact is another codec's, has no plan for `ratio`, or its
    parts do not fit together.
    """

    marks_sinks: ClassVar[bool] = False
    """Whether blobs say which tokens the artifact's sink rule tells, if it has one."""
    pairs: ClassVar[bool] = False
    """Whether K and V of a layer group may share a basis."""

    def __init__(
        self,
        artifact: RankArtifact,
        ratio: float,
        dtype: torch.dtype,
        identity: bytes = NO_FINGERPRINT,
        deflate_level: int = 1,
        device: torch.device | str = "cpu",
        operand: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(artifact.geometry, dtype, identity, device)
        check_artifact(artifact)
        if artifact.section_names == PAIRED and not self.pairs:
            raise ArtifactError(f"codec {self.name!r} has a basis each for K and V, not one")
        if artifact.codec != self.name:
            raise ArtifactError(f"the artifact is for codec {artifact.codec!r}, not {self.name!r}")
        if ratio not in artifact.ratios():
            raise ArtifactError(f"no plan for ratio {ratio}, only {artifact.ratios()}")
        self.artifact = artifact
        self.ratio = float(ratio)
        self._entropy = self._entropy_coder(deflate_level)
        self._ratios = frozenset(artifact.ratios())
        self._max_position = min(
            (rope.max_positions for rope in artifact.ropes), default=MAX_POSITION
        )
        self._sections = {key: s.on(self.device, operand) for key, s in artifact.sections.items()}
        self._sections_of = lru_cache(_LENGTHS)(self._list_sections)

    @property
    def resident_bytes(self) -> int:
        """Memory that bases and means take on the device all the time."""
        return sum(s.basis.nbytes + s.mean.nbytes for s in self._sections.values())

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        self._check_tensors(k, v, start)
        k, v = k.to(self.device), v.to(self.device)
        self._check_values(k, v, start)
        tokens = k.shape[0]
        sinks = self._sinks(start, tokens)
        sections: list[NewSection] = []
        if sinks:
            sections.append(self._sink_section(k[:sinks], v[:sinks]))
        if sinks < tokens:
            positions = self._positions(start + sinks, start + tokens)
            marks = self._marks(v[sinks:])
            if marks is not None:
                sections.append(self._marks_section(marks))
            for group, name in self.artifact.section_keys():
                rows = chunk_rows(k[sinks:], v[sinks:], group, name, self.artifact, positions)
                section = self._sections[group, name]
                plan = section.plans[self.ratio]
                coefficients = to_coefficients(rows, section, plan.rank)
                if marks is not None:
                    coefficients[marks] *= plan.sink_gain
                coded = plan.encode(coefficients, self._entropy)
                sections.append(
                    NewSection(
                        SECTION_KIND[name],
                        coded.coder_id,
                        group,
                        coded.raw_length,
                        coded.encoded,
                    )
                )
                if marks is not None:
                    beyond = self._beyond(rows[marks], section)
                    check_room(plan, tokens - sinks, coded, beyond)
                    sections.append(new_beyond_section(group, name, beyond))
        header = self._new_header(tokens, start, sinks, self.ratio, self.artifact.fingerprint, key)
        return build(header, sections)

    def _check_values(self, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Raise CodecError for NaN and infinity, and for positions outside the RoPE table."""
        if not (self._magnitude(k) < math.inf and self._magnitude(v) < math.inf):
            raise CodecError("non_finite", NON_FINITE)
        last = start + k.shape[0] - 1
        if last >= self._max_position:
            raise CodecError(
                "position",
                f"positions up to {last} are outside the RoPE table of {self._max_position}",
            )

    def _magnitude(self, x: torch.Tensor) -> float:
        """As `magnitude`."""
        return magnitude(x)

    def max_blob_bytes(self, tokens: int) -> int:
        def coded_bytes(coded: int) -> list[int]:
            keys = self.artifact.section_keys()
            return [self._coder(*key, self.ratio).max_bytes(coded) for key in keys]

        return largest_blob(
            self.geometry, self.dtype, tokens, self.artifact.sink_tokens, coded_bytes
        )

    def _sink_section(self, k: torch.Tensor, v: torch.Tensor) -> NewSection:
        """k [S, L, H, D] and v [S, L, H, Dv] in the cache dtype, exactly."""
        streams = shuffle(k) + shuffle(v)
        encoded = self._entropy.encode(streams)
        raw_length = sum(map(len, streams))
        return NewSection(
            SectionKind.SINKS, self._entropy.coder_id, ALL_LAYERS, raw_length, encoded
        )

    def _entropy_coder(self, level: int) -> DeflateCoder:
        """What section coders without tables of their own are given."""
        return DeflateCoder(level=level)

    @property
    def _has_marks(self) -> bool:
        return self.marks_sinks and self.artifact.sink_rule is not None

    def _marks(self, v: torch.Tensor) -> torch.Tensor | None:
        """The sinks among coded tokens, bool [N]; None if blobs do not say.

        v: [N, L, H, Dv] in the cache dtype.
        """
        if not self._has_marks or self.artifact.sink_rule is None:
            return None
        scales = layer_scales(self.artifact, "v", 0, self.geometry.num_layers, v.device)
        return self.artifact.sink_rule.marks(v if scales is None else v.float() * scales)

    def _marks_section(self, marks: torch.Tensor) -> NewSection:
        bitmap = pack_marks(marks)
        encoded = RAW.encode([bitmap])
        return NewSection(SectionKind.MARKS, RAW.coder_id, ALL_LAYERS, len(bitmap), encoded)

    def _beyond(self, rows: torch.Tensor, section: SectionBasis) -> CodedSection:
        """Of marked rows [M, p]: their coefficients past the rank."""
        plan = section.plans[self.ratio]
        if plan.beyond is None or not len(rows):
            return NOTHING_CODED
        coefficients = to_coefficients(rows, section, plan.total_rank)[:, plan.rank :]
        return plan.beyond.encode(coefficients * plan.sink_gain, self._entropy)

    def _check_header(self, header: Header) -> None:
        if header.artifact != self.artifact.fingerprint:
            raise ContainerError("fingerprint", "written with another artifact")
        if header.ratio not in self._ratios:
            raise ContainerError("geometry", f"the artifact has no plan for ratio {header.ratio}")
        if header.sinks != self._sinks(header.start, header.tokens):
            raise ContainerError("geometry", f"{header.sinks} sinks at position {header.start}")
        if header.start + header.tokens > self._max_position:
            raise ContainerError(
                "geometry",
                f"{header.tokens} tokens from position {header.start} pass the RoPE table's "
                f"{self._max_position}",
            )

    def _expected_sections(self, header: Header) -> list[ExpectedSection]:
        return self._sections_of(header.tokens, header.sinks, header.ratio)

    def _list_sections(self, tokens: int, sinks: int, ratio: float) -> list[ExpectedSection]:
        expected: list[ExpectedSection] = []
        if sinks:
            length = sinks * self.geometry.token_elements() * self.dtype.itemsize
            expected.append(ExpectedSection(SectionKind.SINKS, ALL_LAYERS, length))
        coded = tokens - sinks
        if not coded:
            return expected
        if self._has_marks:
            length = marks_length(coded)
            expected.append(ExpectedSection(SectionKind.MARKS, ALL_LAYERS, length, {RAW.coder_id}))
        for group, name in self.artifact.section_keys():
            coder = self._coder(group, name, ratio)
            least, most = coder.raw_length(coded), coder.most_raw_length(coded)
            ids = coder.coder_ids
            expected.append(ExpectedSection(SECTION_KIND[name], group, least, ids, most))
            if self._has_marks:
                most = 0 if coder.beyond is None else coder.beyond.most_raw_length(coded)
                expected.append(ExpectedSection(BEYOND_KIND[name], group, 0, ids, most))
        return expected

    def _groups(self, info: ContainerInfo, blob: memoryview) -> Iterator[DecodedGroup]:
        header = info.header
        sections = iter(info.sections)
        sink_k, sink_v = (
            self._decode_sinks(read_section(next(sections), blob), header.sinks)
            if header.sinks
            else (None, None)
        )
        coded = header.tokens - header.sinks
        positions = self._positions(header.start + header.sinks, header.start + header.tokens)
        marks = None
        if coded and self._has_marks:
            marks = unpack_marks(read_section(next(sections), blob), coded).to(self.device)
        for group, (first, end) in enumerate(self.geometry.layer_groups):
            parts: dict[Kind, list[torch.Tensor]] = {"k": [], "v": []}
            if sink_k is not None and sink_v is not None:
                parts["k"].append(sink_k[:, first:end])
                parts["v"].append(sink_v[:, first:end])
            if coded:
                for name in self.artifact.section_names:
                    section = next(sections)
                    coder = self._coder(group, name, header.ratio)
                    body = stored_body(section, blob)
                    coefficients = coder.decode(section, body, coded, self.device)
                    if marks is not None:
                        coefficients[marks] /= coder.sink_gain
                        beyond = self._read_beyond(next(sections), blob, coder, marks)
                        wider = coefficients.new_zeros(coded, coder.rank + beyond.shape[1])
                        wider[:, : coder.rank] = coefficients
                        wider[marks, coder.rank :] = beyond
                        coefficients = wider
                    rows = from_coefficients(coefficients, self._sections[group, name])
                    for tensor, part in self.geometry.row_parts(group, name).items():
                        own = rows[:, part]
                        parts[tensor].append(
                            rows_to_cache(own, group, tensor, self.artifact, positions, self.dtype)
                        )
            k, v = (p[0] if len(p) == 1 else torch.cat(p) for p in parts.values())
            yield DecodedGroup(first, end, k, v)

    def _read_beyond(
        self, section: Section, blob: memoryview, coder: SectionCoder, marks: torch.Tensor
    ) -> torch.Tensor:
        """Coefficients of marked tokens past the rank: float32 [M, columns]."""
        marked = int(marks.sum())
        if coder.beyond is None or not marked:
            no_beyond(section)
            return torch.zeros((marked, 0), device=self.device)
        body = stored_body(section, blob)
        return coder.beyond.decode(section, body, marked, self.device) / coder.sink_gain

    def _decode_sinks(
        self, payload: bytearray, sinks: int, device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K [S, L, H, D] and V [S, L, H, Dv] in the cache dtype, on `device` or the codec's."""
        geometry = self.geometry
        shape = (sinks, geometry.num_layers, geometry.num_kv_heads)
        k_shape, v_shape = (*shape, geometry.head_size), (*shape, geometry.head_size_v)
        data = torch.frombuffer(payload, dtype=torch.uint8).to(device or self.device)
        v_bytes = sinks * geometry.num_layers * geometry.num_kv_heads * geometry.head_size_v
        v_bytes *= self.dtype.itemsize
        return (
            unshuffle(data[:-v_bytes], self.dtype).view(k_shape),
            unshuffle(data[-v_bytes:], self.dtype).view(v_shape),
        )

    def _sinks(self, start: int, tokens: int) -> int:
        return min(max(self.artifact.sink_tokens - start, 0), tokens)

    def _positions(self, first: int, end: int) -> torch.Tensor:
        return torch.arange(first, end, device=self.device)

    def _coder(self, group: int, name: SectionName, ratio: float) -> SectionCoder:
        return self._sections[group, name].plans[ratio]


def largest_blob(
    geometry: Geometry,
    dtype: torch.dtype,
    tokens: int,
    sink_tokens: int,
    coded_bytes: Callable[[int], list[int]],
) -> int:
    """Upper bound in bytes of a blob of `tokens` tokens, whatever its position.

    coded_bytes: number of coded tokens, at least 1 -> most bytes of each coded section.
    """
    row_elements = geometry.num_layers * geometry.num_kv_heads
    sizes = (geometry.head_size, geometry.head_size_v)

    def bound(sinks: int) -> int:
        streams = [sinks * row_elements * size for size in sizes for _ in range(dtype.itemsize)]
        exact = [max_stored_bytes(streams)] if sinks else []
        coded = coded_bytes(tokens - sinks) if sinks < tokens else []
        return container_bytes(exact + coded)

    return max(map(bound, range(min(sink_tokens, tokens) + 1)))
