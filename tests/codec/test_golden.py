"""Committed blobs of every released format keep decoding, and encoding keeps its codes.

What is pinned: the values that the blobs decode to (within rounding), the
payload of every section bit for bit, and the whole blob for the raw codec.
What is not pinned: the DEFLATE bytes, which belong to the isal version.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.artifact import SectionBasis
from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.frame import SECTION_KIND
from kvtc_vllm.codec.v2.plan import StepPlan
from tests.golden.formula import (
    GEOMETRY,
    GOLDEN,
    IDENTITY,
    SCALES,
    Golden,
)
from tests.golden.plain_reader import PlainRope, PlainSection, read_blob
from tests.golden.plain_reader2 import PlainStepSection

FOLDER = Path(__file__).parents[1] / "golden"
EACH = pytest.mark.parametrize("golden", [pytest.param(g, id=g.name) for g in GOLDEN])
# One unit in the last place, where a BLAS may round the other way.
RELATIVE = {
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
    torch.float8_e4m3fn: 2**-3,
    torch.float8_e5m2: 2**-2,
}


def absolute(golden: Golden) -> float:
    """Tolerance near 0, where fp8 has its subnormals' step."""
    return 2**-9 if golden.dtype.itemsize == 1 else 1e-5


def read(golden: Golden) -> bytes:
    return (FOLDER / f"{golden.name}.kvtc").read_bytes()


def contents(golden: Golden):
    return np.load(FOLDER / f"{golden.name}.npz")


def payloads(blob: bytes) -> list[bytes]:
    return [bytes(read_section(s, memoryview(blob))) for s in parse(blob).sections]


@EACH
def test_decodes_to_the_committed_values(golden):
    decoded = golden.make_codec().decode(read(golden), golden.start, golden.tokens)
    for name in ("k", "v"):
        values = getattr(decoded, name)
        assert values.dtype == golden.dtype
        np.testing.assert_allclose(
            values.float().numpy(),
            contents(golden)[name],
            rtol=RELATIVE[golden.dtype],
            atol=absolute(golden),
        )


@EACH
def test_payloads_are_the_committed_bytes(golden):
    expected = contents(golden)
    found = payloads(read(golden))
    assert len(found) == len([name for name in expected.files if name.startswith("payload")])
    for i, payload in enumerate(found):
        assert payload == expected[f"payload{i}"].tobytes()


@EACH
def test_encoding_gives_the_committed_codes(golden):
    blob = golden.make_codec().encode(*golden.make_chunk(), golden.start)
    assert payloads(blob) == payloads(read(golden))
    assert parse(blob).header == parse(read(golden)).header
    assert parse(blob).header.identity == IDENTITY
    if golden.codec == "raw":
        assert blob == read(golden)


def plain_steps(mean: np.ndarray, basis: np.ndarray, plan: StepPlan) -> PlainStepSection:
    return PlainStepSection(
        mean,
        basis,
        plan.step,
        plan.classes.tolist(),
        plan.widths.tolist(),
        plan.values.numpy(),
        plan.sink_gain,
        None if plan.beyond is None else plain_steps(mean, basis, plan.beyond),
    )


def plain_section(section: SectionBasis, ratio: float) -> PlainSection | PlainStepSection:
    mean, basis = section.mean.numpy(), section.basis.float().numpy()
    plan = section.plans[ratio]
    if isinstance(plan, StepPlan):
        return plain_steps(mean, basis, plan)
    return PlainSection(mean, basis, [(g.start, g.size, g.type) for g in plan.groups])


@EACH
def test_the_written_specification_reads_the_same(golden):
    fitted = golden.make_artifact()
    sections = {
        (group, int(SECTION_KIND[name])): plain_section(section, golden.ratio)
        for (group, name), section in fitted.sections.items()
        if golden.codec != "raw"
    }
    ropes = [
        None
        if index is None
        else PlainRope(
            fitted.ropes[index].cos_sin[:, :2].numpy(),
            fitted.ropes[index].cos_sin[:, 2:].numpy(),
            fitted.ropes[index].neox,
        )
        for index in fitted.layer_rope
    ]
    scales = list(zip(SCALES["k"], SCALES["v"], strict=True)) if golden.scaled else None
    k, v, plain_payloads = read_blob(read(golden), GEOMETRY.layer_groups, sections, ropes, scales)
    assert plain_payloads == payloads(read(golden))
    decoded = golden.make_codec().decode(read(golden))
    for plain, values in ((k, decoded.k), (v, decoded.v)):
        np.testing.assert_allclose(
            values.float().numpy(), plain, rtol=RELATIVE[golden.dtype], atol=absolute(golden)
        )


@EACH
def test_threads_change_nothing_where_arithmetic_is_exact(golden):
    """In general a BLAS may sum in another order; everything after it must not care."""
    codec, (k, v), threads = golden.make_codec(), golden.make_chunk(), torch.get_num_threads()
    blobs = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            blobs.add(codec.encode(k, v, golden.start))
    finally:
        torch.set_num_threads(threads)
    assert len(blobs) == 1


def test_the_example_in_the_specification_is_the_file():
    text = (FOLDER.parents[1] / "FORMAT.md").read_text().partition("## 8. Example")[2]
    dump = bytearray()
    for offset, line in re.findall(r"^([0-9a-f]{3})  ([0-9a-f].*)$", text, re.MULTILINE):
        assert int(offset, 16) == len(dump)
        shown = re.match(r"(?:[0-9a-f]{2}(?:\s+|$))+", line)
        assert shown is not None
        dump += bytes.fromhex(shown[0])
    assert dump == (FOLDER / "v1-kvtc-fp16-one-token.kvtc").read_bytes()
