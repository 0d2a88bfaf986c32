"""A codec that only this file knows, added by one row: all that a second version needs.

One byte a coefficient: a step each, fitted, and an entropy coder whose table is fitted too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import kvtc_vllm
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.artifact.rank_file import Probe, read_rank_file, write_rank_file
from kvtc_vllm.codec import registry
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    NewSection,
    Section,
    build,
    checksum,
    parse,
)
from kvtc_vllm.codec.entropy import (
    DEFLATE,
    EncodedSection,
    EntropyCoder,
    Unit,
    max_stored_bytes,
)
from kvtc_vllm.codec.errors import ArtifactError, CodecError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.registry import CODECS, ArtifactRules, CodecSpec, open_codec
from kvtc_vllm.codec.section_coder import CodedSection, CoderTensors, read_body
from kvtc_vllm.codec.transform import chunk_rows, magnitude
from tests.codec import contract
from tests.codec.contract import CONTRACT, MODEL, RATIOS, made_up_artifact, open_made_up, refused

TABLE_CODER_ID = 200


@dataclass(frozen=True)
class TableCoder:
    """DEFLATE of bytes that go through a table [256], a permutation."""

    table: bytes
    name: str = "toy table"
    coder_id: int = TABLE_CODER_ID

    def encode(self, streams: Sequence[bytes]) -> EncodedSection:
        return DEFLATE.encode([stream.translate(self.table) for stream in streams])

    def decode(self, units: Sequence[Unit], body: memoryview, raw_length: int) -> bytearray:
        inverse = bytes(sorted(range(256), key=self.table.__getitem__))
        return DEFLATE.decode(units, body, raw_length).translate(inverse)


@dataclass(frozen=True)
class ToyCoder:
    """steps: float32 [rank]. table: uint8 [256]."""

    steps: torch.Tensor
    table: torch.Tensor
    expected_error: float
    coder_ids: tuple[int, ...] = (TABLE_CODER_ID,)

    @property
    def rank(self) -> int:
        return len(self.steps)

    @property
    def entropy(self) -> TableCoder:
        return TableCoder(bytes(self.table.tolist()))

    @property
    def beyond(self) -> None:
        return None

    @property
    def total_rank(self) -> int:
        return self.rank

    @property
    def sink_gain(self) -> float:
        return 1.0

    def raw_length(self, tokens: int) -> int:
        return tokens * self.rank

    def most_raw_length(self, tokens: int) -> int:
        return self.raw_length(tokens)

    def max_bytes(self, tokens: int) -> int:
        return max_stored_bytes([self.raw_length(tokens)])

    def encode(self, coefficients: torch.Tensor, entropy: EntropyCoder) -> CodedSection:
        if not magnitude(coefficients) <= 1e6:
            raise CodecError("range", "too large")
        codes = (coefficients / self.steps).round().clamp(-127, 127).to(torch.int8)
        payload = codes.numpy().tobytes()
        return CodedSection(TABLE_CODER_ID, len(payload), self.entropy.encode([payload]))

    def decode(
        self, section: Section, body: memoryview, tokens: int, device: torch.device
    ) -> torch.Tensor:
        payload = read_body(section, body, self.entropy)
        codes = torch.frombuffer(payload, dtype=torch.int8).to(device)
        return codes.view(tokens, self.rank) * self.steps.to(device)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"steps": self.steps, "table": self.table}

    def fingerprint_bytes(self) -> bytes:
        return b"".join(x.numpy().tobytes() for x in self.tensors().values())


def rank_at(row_size: int, ratio: float) -> int:
    return int(2 * row_size / ratio)


def make_toy(coefficients: torch.Tensor, row_size: int, ratio: float) -> ToyCoder:
    rank = rank_at(row_size, ratio)
    table = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return ToyCoder(torch.full((rank,), 0.25), table, 0.1)


def read_toy(tensors: CoderTensors, ratio: float, error: float, rank: int) -> ToyCoder:
    steps = tensors.load("steps", ("F32",), (None,))
    if len(steps) > rank or float(steps.min()) <= 0:
        raise tensors.error("steps", "are too many or not positive")
    return ToyCoder(steps, tensors.load("table", ("U8",), (256,)), error)


def toy_bytes(row_size: int, ratio: float, tokens: int) -> int:
    payload = tokens * rank_at(row_size, ratio)
    return max_stored_bytes([payload]) + max_stored_bytes([1])


class ToyCodec(TransformCodec):
    codec_id: ClassVar[int] = 77
    name: ClassVar[str] = "toy"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = ArtifactRules(read_toy, lambda sections: None, toy_bytes)
    monkeypatch.setitem(CODECS, "toy", CodecSpec(ToyCodec, rules))
    monkeypatch.setitem(contract.PLANS, "toy", make_toy)


@pytest.fixture
def artifact() -> RankArtifact:
    return made_up_artifact("toy")


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
def test_the_contract_holds(promise: Callable[[str], None]) -> None:
    promise("toy")


def test_it_is_known_by_its_number() -> None:
    blob = open_made_up("toy").encode(*MODEL.chunk(8), 0)
    assert registry.name_of(parse(blob).header.codec_id) == "toy"
    assert registry.name_of(78) is None


def test_the_entropy_coder_has_its_tables_from_the_artifact(artifact: RankArtifact) -> None:
    """Another table, another payload; and a reader takes no coder that it did not ask for."""
    codec = open_codec("toy", torch.bfloat16, artifact=artifact, ratio=4.0)
    blob = codec.encode(*MODEL.chunk(16, 64), 64)
    info = parse(blob)
    assert {section.coder_id for section in info.sections} == {TABLE_CODER_ID}
    mirrored = {
        key: replace(
            section,
            plans={r: replace(p, table=p.table.flip(0)) for r, p in section.plans.items()},
        )
        for key, section in artifact.sections.items()
    }
    other = open_codec(
        "toy", torch.bfloat16, artifact=replace(artifact, sections=mirrored), ratio=4.0
    )
    assert not torch.equal(other.decode(blob).v, codec.decode(blob).v)
    view = memoryview(blob)
    general = [
        NewSection(
            s.kind,
            DEFLATE.coder_id,
            s.group,
            s.raw_length,
            EncodedSection(s.units, bytes(view[s.offset : s.offset + s.stored_length])),
        )
        for s in info.sections
    ]
    assert refused(codec, build(info.header, general)) == "version"
    version_1 = open_made_up("kvtc", identity=bytes(16))
    own = version_1.encode(*MODEL.chunk(16, 64), 64)
    swapped = bytearray(own[:-CHECKSUM_BYTES])
    swapped[HEADER_BYTES + 1] = TABLE_CODER_ID
    assert refused(version_1, bytes(swapped) + checksum(swapped)) == "version"


def test_rank_file_and_fingerprint_know_nothing_of_it(
    artifact: RankArtifact, tmp_path: Path
) -> None:
    sections = {
        key: replace(
            section,
            heldout_error=dict.fromkeys(RATIOS, 0.2),
            weights=torch.linspace(0.5, 2.0, len(section.mean)),
        )
        for key, section in artifact.sections.items()
    }
    fingerprint = artifact_fingerprint(artifact.geometry, sections, artifact.sink_tokens)
    plain = artifact_fingerprint(artifact.geometry, artifact.sections, artifact.sink_tokens)
    assert fingerprint != plain
    whole = replace(artifact, sections=sections, fingerprint=fingerprint)
    k, v = (x.half() for x in MODEL.chunk(4))
    probe = Probe(k=k, v=v, positions=torch.arange(4, dtype=torch.int32))
    path = tmp_path / "rank0of1.safetensors"
    write_rank_file(path, whole, probe, 0, 1)
    loaded, _ = read_rank_file(path, 0, 1)
    assert (loaded.codec, loaded.fingerprint) == ("toy", fingerprint)
    codecs = [open_codec("toy", torch.bfloat16, artifact=a, ratio=8.0) for a in (whole, loaded)]
    blobs = [codec.encode(*MODEL.chunk(32, 8), 8) for codec in codecs]
    assert blobs[0] == blobs[1]
    with pytest.raises(ArtifactError, match="for codec 'toy', not 'kvtc'"):
        open_codec("kvtc", torch.bfloat16, artifact=loaded, ratio=8.0)
    for changes, message in (
        ({"codec": "zip"}, r"rank0of1\.safetensors: codec is 'zip', whose artifacts"),
        ({"codec": "raw"}, "codec is 'raw', whose artifacts"),
        ({"codec": "kvtc"}, r"k0\.plan0 is missing"),
        ({"sink_tokens": 256}, "sink_tokens is 256, 0 to 255 are right"),
    ):
        write_rank_file(path, replace(whole, **changes), probe, 0, 1)
        with pytest.raises(ArtifactError, match=message):
            read_rank_file(path, 0, 1)


def test_weights_move_the_error_to_where_they_are_small(artifact: RankArtifact) -> None:
    """Elements of high weight are coded better than without, the others worse."""
    heavy = torch.arange(MODEL.geometry.row_size(1, "v")) % 2 == 0
    k, v = MODEL.chunk(256, 512, seed=3)
    errors = []
    for weights in (None, torch.where(heavy, 4.0, 0.25)):
        section = artifact.sections[1, "v"]
        rows = MODEL.rows(1024, 1, "v", 0) - section.mean
        scaled = rows if weights is None else rows * weights
        _, _, basis = torch.linalg.svd(scaled, full_matrices=False)
        fitted = replace(section, basis=basis.T.half(), weights=weights)
        changed = replace(artifact, sections={**artifact.sections, (1, "v"): fitted})
        codec = open_codec("toy", torch.float32, artifact=changed, ratio=8.0)
        decoded = codec.decode(codec.encode(k.float(), v.float(), 512))
        positions = torch.arange(512, 768)
        before = chunk_rows(k, v, 1, "v", artifact, positions)
        after = chunk_rows(decoded.k, decoded.v, 1, "v", artifact, positions)
        squared = (before - after).square().mean(0)
        errors.append((float(squared[heavy].sum()), float(squared[~heavy].sum())))
    (plain_heavy, plain_light), (weighted_heavy, weighted_light) = errors
    assert weighted_heavy < plain_heavy
    assert weighted_light > plain_light


@pytest.mark.parametrize(
    "weights", [torch.ones(3), torch.zeros(16), torch.full((16,), float("nan")), torch.ones(16, 1)]
)
def test_wrong_weights_are_refused(artifact: RankArtifact, weights: torch.Tensor) -> None:
    section = replace(artifact.sections[0, "k"], weights=weights)
    broken = replace(artifact, sections={**artifact.sections, (0, "k"): section})
    with pytest.raises(ArtifactError, match="weights of section 0k"):
        open_codec("toy", torch.bfloat16, artifact=broken, ratio=4.0)


@pytest.mark.parametrize("sinks", [-1, 256])
def test_more_sinks_than_the_header_counts_are_refused(artifact: RankArtifact, sinks: int) -> None:
    with pytest.raises(ArtifactError, match=f"sink_tokens is {sinks}, 0 to 255"):
        open_codec("toy", torch.bfloat16, artifact=replace(artifact, sink_tokens=sinks), ratio=4.0)


def test_what_does_not_go_together_is_said(artifact: RankArtifact) -> None:
    with pytest.raises(
        ValueError, match="codec 'zip' is not known; allowed: raw, kvtc, kvtc2, toy"
    ):
        open_codec("zip", torch.bfloat16, geometry=MODEL.geometry)
    with pytest.raises(ValueError, match="'raw' takes no artifact"):
        open_codec("raw", torch.bfloat16, artifact=artifact, ratio=4.0)
    with pytest.raises(ValueError, match="'kvtc' needs an artifact"):
        open_codec("kvtc", torch.bfloat16, geometry=MODEL.geometry)


def test_nothing_outside_the_codec_names_a_codec_to_build_it() -> None:
    package = Path(kvtc_vllm.__file__).parent
    named = re.compile(rf"\b({KvtcCodec.__name__}|Kvtc2Codec|RawCodec)\(")
    found = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "codec" not in path.relative_to(package).parts and named.search(path.read_text())
    ]
    assert found == []
