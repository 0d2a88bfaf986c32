"""Entropy coders: round trips, units, and refusal of anything that does not fit."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtc_vllm.codec import entropy
from kvtc_vllm.codec.entropy import (
    BY_CODER_ID,
    MAX_UNIT_BYTES,
    DeflateCoder,
    Unit,
    aligned,
    cut_units,
)
from kvtc_vllm.codec.entropy.unit_table import SectionBody, unit_table
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.deflate_nvcomp import NVCOMP

# By every way that there is: those of the host, and the one for a GPU.
REGISTRY = {**entropy.REGISTRY, NVCOMP.name: NVCOMP}
CODERS = [pytest.param(coder, id=name) for name, coder in REGISTRY.items()]
CODERS += [pytest.param(DeflateCoder(level), id=f"deflate-{level}") for level in (0, 2, 3)]
NO_MATCHES = DeflateCoder(matches=False, unit_bytes=1000)
CODERS += [pytest.param(NO_MATCHES, id="deflate-no-matches")]
COMPRESSIBLE = bytes(range(64)) * 40
NOISE = bytes((i * i * 7919 + i // 3) % 251 ^ (i * 31 % 256) for i in range(300))


def round_trip(coder, streams):
    encoded = coder.encode(streams)
    raw = b"".join(streams)
    assert bytes(coder.decode(encoded.units, memoryview(encoded.body), len(raw))) == raw
    return encoded


@pytest.mark.parametrize("coder", CODERS)
@given(streams=st.lists(st.binary(max_size=300), max_size=5))
def test_round_trip(coder, streams):
    round_trip(coder, streams)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("size", [1, MAX_UNIT_BYTES - 1, MAX_UNIT_BYTES, MAX_UNIT_BYTES + 1])
def test_round_trip_at_the_unit_limit(coder, size):
    round_trip(coder, [COMPRESSIBLE, (COMPRESSIBLE * 30)[:size]])


def test_units_do_not_cross_streams_and_are_aligned():
    encoded = round_trip(REGISTRY["deflate"], [COMPRESSIBLE, b"", NOISE[:7], bytes(20_000)])
    assert [u.raw_length for u in encoded.units] == [2560, 7, 10_000, 10_000]
    assert list(cut_units([2560, 0, 7, 20_000])) == [2560, 7, 10_000, 10_000]
    assert list(cut_units([65536])) == [8192] * 8
    assert encoded.units[1] == Unit(7, 7)
    assert all(1 <= u.stored_length <= u.raw_length for u in encoded.units)
    assert len(encoded.body) == sum(aligned(u.stored_length) for u in encoded.units)


@pytest.mark.parametrize("coder", [DeflateCoder(), DeflateCoder(matches=False)])
def test_other_inflaters_read_the_units(coder):
    encoded = coder.encode([COMPRESSIBLE])
    stored = encoded.body[: encoded.units[0].stored_length]
    assert zlib.decompress(stored, wbits=-15) == COMPRESSIBLE


def test_without_matches_only_runs_are_shortened():
    """Text that repeats after some bytes takes what its letters take; a run takes nothing."""
    (repeated,), (run,) = (
        DeflateCoder(matches=False).encode([text]).units for text in (COMPRESSIBLE, bytes(2560))
    )
    assert repeated.stored_length > 0.7 * len(COMPRESSIBLE) > 3 * run.stored_length
    assert DeflateCoder().encode([COMPRESSIBLE]).units[0].stored_length < repeated.stored_length / 4


@pytest.mark.parametrize(
    ("length", "units"), [(1, [1]), (1499, [1499]), (1500, [750, 750]), (3100, [1034, 1034, 1032])]
)
def test_smaller_units_are_of_about_one_size(length, units):
    encoded = round_trip(NO_MATCHES, [bytes(length)])
    assert [unit.raw_length for unit in encoded.units] == units


def test_units_of_other_deflaters_are_read():
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    stored = deflater.compress(COMPRESSIBLE) + deflater.flush()
    unit = Unit(len(COMPRESSIBLE), len(stored))
    body = stored.ljust(aligned(len(stored)), b"\0")
    assert REGISTRY["deflate"].decode((unit,), memoryview(body), unit.raw_length) == COMPRESSIBLE


def refuse(coder, units, body, raw_length):
    with pytest.raises(ContainerError) as caught:
        coder.decode(units, memoryview(body), raw_length)
    assert caught.value.reason == "entropy"


def test_deflate_refuses_what_does_not_fit():
    coder = DeflateCoder()
    encoded = coder.encode([COMPRESSIBLE])
    (unit,), body, raw = encoded.units, encoded.body, len(COMPRESSIBLE)
    refuse(coder, (), b"", raw)
    refuse(coder, (unit,), body, raw + 1)
    refuse(coder, (unit,), body + b"\0\0\0\0", raw)
    refuse(coder, (unit,), body[:-4], raw)
    refuse(coder, (Unit(raw - 1, unit.stored_length),), body, raw - 1)
    refuse(coder, (Unit(raw + 1, unit.stored_length),), body, raw + 1)
    shorter = Unit(raw, unit.stored_length - 5)
    refuse(coder, (shorter,), body[: aligned(shorter.stored_length)], raw)
    longer = Unit(raw, unit.stored_length + 8)
    refuse(coder, (longer,), body.ljust(aligned(longer.stored_length), b"\0"), raw)
    refuse(coder, (unit,), b"\xff" * len(body), raw)


def test_deflate_refuses_padding_that_is_not_zero():
    coder = DeflateCoder()
    refuse(coder, (Unit(5, 5),), b"12345\0\0x", 5)


def test_every_byte_of_padding_of_many_sections_is_looked_at():
    stored = [5, 8, 6, 7, 5]
    data = np.zeros(8 * len(stored), np.uint8)
    sections = [SectionBody([Unit(9, size)], 8 * i, 8, 9) for i, size in enumerate(stored)]
    for i, size in enumerate(stored):
        data[8 * i : 8 * i + size] = 0xFF
    assert unit_table(sections, data)[1] == []
    for i, size in enumerate(stored):
        for place in range(8 * i + size, 8 * (i + 1)):
            data[place] = 1
            assert unit_table(sections, data)[1] == [i]
            data[place] = 0


def test_deflate_never_inflates_past_the_declared_length():
    """A bomb: 60 MB of zeros in a unit that declares 100 bytes."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflater.compress(bytes(60_000_000)) + deflater.flush()
    bomb = bomb[: len(bomb) // 4 * 4]
    refuse(DeflateCoder(), (Unit(100, len(bomb)),), bomb, 100)


def test_raw_refuses_what_does_not_fit():
    coder = REGISTRY["raw"]
    refuse(coder, (), b"1234", 5)
    refuse(coder, (), b"1234", 3)
    refuse(coder, (Unit(4, 4),), b"1234", 4)


def test_numbers_and_levels():
    numbers = {name: coder.coder_id for name, coder in REGISTRY.items()}
    assert numbers == {"raw": 0, "deflate": 1, "deflate-nvcomp": 1}
    assert {n: coder.name for n, coder in BY_CODER_ID.items()} == {0: "raw", 1: "deflate"}
    with pytest.raises(ValueError, match="level 4"):
        DeflateCoder(4)
    with pytest.raises(ValueError, match="units of 0 bytes"):
        DeflateCoder(matches=False, unit_bytes=0)
