"""Bit packing against a bit-by-bit definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtc_vllm.codec.packing import SUPPORTED_BITS, pack, packed_size, unpack


def pack_bit_by_bit(codes: list[int], bits: int) -> bytes:
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(packed_size(len(codes), bits), "little")


@given(st.data(), st.sampled_from(SUPPORTED_BITS), st.integers(0, 70))
def test_least_significant_bits_first(data, bits, count):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == pack_bit_by_bit(codes, bits)
    assert unpack(packed, bits, count).tolist() == codes


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_runs_are_packed_apart(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 7), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, packed_size(7, bits))
    assert torch.equal(packed[1, 2], pack(codes[1, 2], bits))
    assert torch.equal(unpack(packed, bits, 7), codes)


def test_packing_leaves_its_input_alone():
    codes = torch.ones(8, dtype=torch.uint8)
    pack(codes, 2)
    assert codes.tolist() == [1] * 8


def test_padding_bits_are_ignored():
    assert unpack(torch.tensor([0b11111101], dtype=torch.uint8), 2, 1).tolist() == [1]


def test_errors():
    with pytest.raises(ValueError, match="3 bits"):
        pack(torch.zeros(4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="3 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), 3, 4)
    with pytest.raises(ValueError, match="take 2 bytes, not 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4, 3)
