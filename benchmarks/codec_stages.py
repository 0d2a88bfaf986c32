"""Where the codec's time goes: its own steps one by one, reference, fast way and codec 2."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from benchmarks.codec_rows import Rows
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.base import ChunkCodec, DecodedChunk, NewChunk
from kvtc_vllm.codec.container import checksum, parse
from kvtc_vllm.codec.cpu.codec import CpuCodec, CpuKvtc2Codec
from kvtc_vllm.codec.cpu.products import Operand
from kvtc_vllm.codec.cpu.rows import Floats, largest_bits16
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.cpu.tiles import Span
from kvtc_vllm.codec.entropy import DeflateCoder
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import bit_plan, decode_payload, encode_payload
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.transform import (
    centred_rows,
    chunk_rows,
    magnitude,
    rows_to_cache,
)
from kvtc_vllm.codec.v2.codec import ENTROPY

ROUNDS = 7
T = TypeVar("T")


def stages(
    rows: Rows, ratios: tuple[float, ...], other: RankArtifact | None = None
) -> list[dict[str, float | str]]:
    """Microseconds per token of every step, both sections together, for an artifact in one group.

    other: another artifact of the model, whose codec's fast way is timed too. The reference's steps
    are those of version 1. rest: of the whole call, what is in no step: sinks, headers, Python, and
    caches that are cold between steps.
    """
    artifacts = [rows.artifact] if other is None else [rows.artifact, other]
    if any(len(artifact.geometry.layer_groups) != 1 for artifact in artifacts):
        raise ValueError("stages are of artifacts with all layers in one group")
    found: list[dict[str, float | str]] = []
    for ratio in ratios:
        codecs: dict[str, ChunkCodec] = {}
        if rows.artifact.codec == KvtcCodec.name:
            codecs["reference"] = KvtcCodec(rows.artifact, ratio, rows.k.dtype)
        for way, artifact in zip(("fast", "other"), artifacts, strict=False):
            if ratio in artifact.ratios():
                codecs[way] = open_codec(
                    artifact.codec, rows.k.dtype, artifact=artifact, ratio=ratio
                )
        for way, codec in codecs.items():
            blob = codec.encode(rows.k, rows.v, rows.start)
            whole: dict[str, Callable[[], object]] = {
                "encode": functools.partial(codec.encode, rows.k, rows.v, rows.start),
                "decode": functools.partial(codec.decode, blob),
            }
            if isinstance(codec, CpuCodec):
                steps = _fast_steps(rows, ratio, blob, codec)
            else:
                steps = _reference_steps(rows, ratio, blob)
            for call, times in steps.items():
                row: dict[str, float | str] = {"ratio": ratio, "way": way, "call": call}
                row["real_ratio"] = round(rows.nbytes / len(blob), 2)
                total = _time(whole[call]) / rows.tokens * 1e6
                row |= {name: round(t / rows.tokens * 1e6, 2) for name, t in times.items()}
                row["rest"] = round(total - sum(times.values()) / rows.tokens * 1e6, 2)
                row["whole"] = round(total, 2)
                found.append(row)
    return found


def _reference_steps(rows: Rows, ratio: float, blob: bytes) -> dict[str, dict[str, float]]:
    encode: dict[str, float] = {}
    decode: dict[str, float] = {}
    _add(encode, "finite", lambda: (magnitude(rows.k), magnitude(rows.v)))
    _add(encode, "checksum", lambda: checksum(blob))
    _add(decode, "parse and checksum", lambda: parse(blob))
    positions = torch.arange(rows.start, rows.start + rows.tokens)
    for (group, name), resident in rows.artifact.sections.items():
        section = resident.on(torch.device("cpu"))
        plan = bit_plan(section, ratio)
        basis = section.basis[:, : plan.rank]
        cache = functools.partial(chunk_rows, rows.k, rows.v, group, name, rows.artifact, positions)
        plain = _add(encode, "cast and RoPE", cache)
        centred = _add(encode, "mean", functools.partial(centred_rows, plain, section))
        x = _add(encode, "product", functools.partial(torch.mm, centred, basis))
        streams = _add(encode, "quantise and pack", functools.partial(encode_payload, x, plan))
        payload = _deflate(encode, decode, streams, DeflateCoder())
        x = _add(
            decode,
            "unpack and dequantise",
            functools.partial(decode_payload, payload, plan, rows.tokens),
        )
        restored = _add(
            decode, "product and mean", functools.partial(torch.addmm, section.mean, x, basis.T)
        )
        for tensor, part in rows.artifact.geometry.row_parts(group, name).items():
            own = restored[:, part]
            back = functools.partial(
                rows_to_cache, own, group, tensor, rows.artifact, positions, rows.k.dtype
            )
            _add(decode, "RoPE and cast", back)
    return {"encode": encode, "decode": decode}


def _fast_steps(
    rows: Rows, ratio: float, blob: bytes, codec: CpuCodec
) -> dict[str, dict[str, float]]:
    encode: dict[str, float] = {}
    decode: dict[str, float] = {}
    chunk = NewChunk(rows.k, rows.v, rows.start)
    empty = DecodedChunk(torch.empty_like(rows.k), torch.empty_like(rows.v), rows.start)
    flat = [x.flatten().view(torch.uint16).numpy() for x in (rows.k, rows.v)]
    _add(encode, "finite", lambda: [largest_bits16(x) for x in flat])
    _add(encode, "checksum", lambda: checksum(blob))
    _add(decode, "parse and checksum", lambda: parse(blob))
    coder = DeflateCoder()
    marked = np.zeros(0, np.int64)
    if isinstance(codec, CpuKvtc2Codec):
        coder = ENTROPY
        rule = codec.artifact.sink_rule
        if rule is not None:
            marked = np.flatnonzero(_add(encode, "marks", lambda: rule.marks(rows.v)).numpy())
    end = rows.start + rows.tokens
    span = Span(0, rows.start, end, 0)
    for key, section in codec.sections(ratio).items():
        operand = section.forward.empty(rows.tokens)
        take = functools.partial(codec.cache_rows.take, chunk, span, key, section, operand)
        _add(encode, "cast, RoPE, mean, int8", take)
        restored, factors = _coded(encode, decode, section, operand, coder)
        if section.beyond is not None and len(marked):
            _coded(encode, decode, section.beyond, operand.part(marked), coder, " beyond")
        give = functools.partial(
            codec.cache_rows.give, restored, factors, span, key, section, empty
        )
        _add(decode, "mean, RoPE, cast", give)
    return {"encode": encode, "decode": decode}


def _coded(
    encode: dict[str, float],
    decode: dict[str, float],
    section: FastSection,
    operand: Operand,
    coder: DeflateCoder,
    name: str = "",
) -> tuple[Floats, Floats]:
    """From the rows of a section to what a product restores, and its factors.

    name: behind that of each step.
    """
    product = _add(encode, "product" + name, functools.partial(section.forward.of, operand))
    code = functools.partial(_payload_of_copy, section, product, operand.factors)
    streams = _add(encode, "quantise and pack" + name, code, _time(product.clone))
    payload = _deflate(encode, decode, streams, coder, name)
    x = np.zeros((len(product), section.live), np.float32)
    read = functools.partial(section.coefficients, payload, x)
    _add(decode, "unpack and dequantise" + name, read)
    taken = _add(decode, "int8" + name, functools.partial(section.inverse.operand, x))
    restored = _add(decode, "product" + name, functools.partial(section.inverse.of, taken))
    return restored.numpy(), taken.factors


def _payload_of_copy(section: FastSection, product: torch.Tensor, factors: Floats) -> list[bytes]:
    return section.payload(product.clone(), factors)


def _deflate(
    encode: dict[str, float],
    decode: dict[str, float],
    streams: list[bytes],
    coder: DeflateCoder,
    name: str = "",
) -> bytearray:
    coded = _add(encode, "DEFLATE" + name, functools.partial(coder.encode, streams))
    length = sum(map(len, streams))
    return _add(
        decode,
        "inflate" + name,
        functools.partial(coder.decode, coded.units, memoryview(coded.body), length),
    )


def _add(times: dict[str, float], name: str, call: Callable[[], T], less: float = 0.0) -> T:
    """Add a call's time but for `less` seconds of it; gives its result."""
    times[name] = times.get(name, 0.0) + _time(call) - less
    return call()


def _time(call: Callable[[], object]) -> float:
    """Median CPU time of a call, after one that is not counted."""
    call()
    taken = []
    for _ in range(ROUNDS):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)
