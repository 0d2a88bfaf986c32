"""What every codec of `CODECS` must do, as functions of one made-up model's codec.

`open_made_up` opens a codec by its row. One that needs an artifact also needs a line in `PLANS`:
how its section coders are made for rows with given variances.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis
from kvtc_vllm.codec.base import ChunkCodec, NewChunk
from kvtc_vllm.codec.bitplan import allocate
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.registry import CODECS, max_blob_bytes, open_codec
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.transform import to_coefficients
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_plan_of

MODEL = SyntheticModel(
    num_layers=3, num_kv_heads=2, head_size=8, head_size_v=12, layer_groups=((0, 1), (1, 3))
)
RATIOS = (4.0, 8.0)
IDENTITY = bytes(range(16))

PLANS: dict[str, Callable[[torch.Tensor, int, float], SectionCoder]] = {
    "kvtc": lambda coefficients, row_size, ratio: allocate(coefficients, row_size, [ratio])[ratio],
    "kvtc2": step_plan_of,
}
"""Codec -> (coefficients [n, r], elements of a row, target ratio) -> section coder."""


@lru_cache
def made_up_artifact(name: str) -> RankArtifact:
    """An artifact of the codec, fitted on few rows."""
    fitted = MODEL.artifact(RATIOS, fit_rows=256)

    def coded(section: SectionBasis, rows: torch.Tensor) -> SectionBasis:
        coefficients = to_coefficients(rows, section, section.basis.shape[1])
        plans = {r: PLANS[name](coefficients, rows.shape[1], r) for r in RATIOS}
        return replace(section, basis=section.basis.contiguous(), plans=plans)

    sections = {key: coded(s, MODEL.rows(256, *key, seed=0)) for key, s in fitted.sections.items()}
    return replace(fitted, sections=sections, codec=name)


def open_made_up(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    identity: bytes = IDENTITY,
    sink_tokens: int = 4,
) -> ChunkCodec:
    """The codec of this name for the model, at ratio 4 if it has ratios."""
    if not CODECS[name].needs_artifact:
        return open_codec(name, dtype, geometry=MODEL.geometry, identity=identity)
    artifact = replace(made_up_artifact(name), sink_tokens=sink_tokens)
    return open_codec(name, dtype, artifact=artifact, ratio=4.0, identity=identity)


def refused(codec: ChunkCodec, blob: bytes | bytearray, key: bytes = b"") -> str:
    """Reason for which the blob is refused."""
    with pytest.raises(ContainerError) as caught:
        codec.decode(blob, key=key)
    return caught.value.reason


def round_trip(name: str) -> None:
    codec = open_made_up(name)
    for start, tokens in ((0, 1), (0, 4), (2, 17), (1000, 64)):
        k, v = MODEL.chunk(tokens, start)
        decoded = codec.decode(codec.encode(k, v, start), start, tokens)
        assert decoded.start == start
        for back, original in ((decoded.k, k), (decoded.v, v)):
            assert (back.shape, back.dtype) == (original.shape, original.dtype)
            error = (back.float() - original.float()).square().sum()
            assert error < 0.4 * original.float().square().sum()


def strides_do_not_matter(name: str) -> None:
    codec = open_made_up(name)
    k, v = MODEL.chunk(32)
    scattered = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (k, v)]
    assert not scattered[0].is_contiguous()
    assert codec.encode(*scattered, 0) == codec.encode(k, v, 0)


def threads_do_not_matter(name: str) -> None:
    codec = open_made_up(name)
    chunks = [MODEL.chunk(16, 16 * i, seed=i) for i in range(8)]
    blobs = [codec.encode(k, v, 16 * i) for i, (k, v) in enumerate(chunks)]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda i: codec.encode(*chunks[i], 16 * i), range(8)))
        decoded = list(pool.map(codec.decode, blobs))
    assert again == blobs
    for blob, chunk in zip(blobs, decoded, strict=True):
        assert torch.equal(codec.decode(blob).v, chunk.v)


def foreign_blobs_are_refused(name: str) -> None:
    codec = open_made_up(name)
    k, v = MODEL.chunk(8)
    blob = codec.encode(k, v, 0, key=b"mine")
    assert codec.decode(blob, key=b"mine").start == 0
    assert refused(codec, blob, b"yours") == "fingerprint"
    assert refused(open_made_up(name, identity=bytes(16)), blob, b"mine") == "fingerprint"
    for other in CODECS.keys() - {name}:
        assert refused(open_made_up(other), blob, b"mine") == "version"


def truncations_are_found(name: str) -> None:
    codec = open_made_up(name)
    blob = codec.encode(*MODEL.chunk(5, 2), 2)
    for length in range(len(blob)):
        expected = "truncated" if length < HEADER_BYTES + CHECKSUM_BYTES else "checksum"
        assert refused(codec, blob[:length]) == expected


def bit_flips_are_found(name: str) -> None:
    codec = open_made_up(name)
    damaged = bytearray(codec.encode(*MODEL.chunk(5, 2), 2))
    for place in range(len(damaged)):
        damaged[place] ^= 1 << place % 8
        assert refused(codec, damaged) in {"magic", "version", "checksum"}
        damaged[place] ^= 1 << place % 8


def sizes_are_bounded(name: str) -> None:
    """Of noise, which does not shrink, with few and many sinks, in every kind of cache.

    A codec may refuse what is larger.
    """
    noise = torch.Generator().manual_seed(5)
    geometry = MODEL.geometry
    for sinks in (0, 4, 8, 200):
        for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
            codec = open_made_up(name, dtype, sink_tokens=sinks)
            for tokens in (1, 7, 9, 128):
                bound = codec.max_blob_bytes(tokens)
                shape = (tokens, geometry.num_layers, geometry.num_kv_heads)
                k = torch.randn(*shape, geometry.head_size, generator=noise).to(dtype)
                v = torch.randn(*shape, geometry.head_size_v, generator=noise).to(dtype)
                for start in (0, 2, tokens, 1000):
                    (made,) = codec.encode_many([NewChunk(k, v, start)])
                    if isinstance(made, CodecError):
                        assert made.reason == "size"
                    else:
                        assert len(made) <= bound
                assert bound <= max_blob_bytes(
                    name, dtype, tokens, geometry=geometry, sink_tokens=sinks, ratio=4.0
                )


CONTRACT: tuple[Callable[[str], None], ...] = (
    round_trip,
    strides_do_not_matter,
    threads_do_not_matter,
    foreign_blobs_are_refused,
    truncations_are_found,
    bit_flips_are_found,
    sizes_are_bounded,
)
