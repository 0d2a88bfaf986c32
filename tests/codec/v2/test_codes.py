"""Codes <-> payload: packed codes, escapes, wide ones, and payloads that do not come out even."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.v2.codes import (
    MAX_LEVEL,
    WIDTHS,
    decode_codes,
    encode_codes,
    least_length,
    most_length,
    packed_columns,
)

CPU = torch.device("cpu")


def drawn_codes(rank: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Mostly small, some beyond every width, some wide."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 4, (rank, tokens), generator=generator)
    scale = torch.tensor([1, 1, 1, 30, 300, 20_000])
    chosen = torch.randint(0, len(scale), (rank, tokens), generator=generator)
    return (small * scale[chosen]).int()


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 128])
def test_round_trip(tokens: int) -> None:
    widths = torch.tensor([2, 8, 2, 4, 4, 2, 8], dtype=torch.uint8)
    parts = packed_columns(widths)
    assert [(part.width, part.columns.tolist()) for part in parts] == [
        (2, [0, 2, 5]),
        (4, [3, 4]),
        (8, [1, 6]),
    ]
    codes = drawn_codes(len(widths), tokens)
    payload = bytearray(b"".join(encode_codes(codes, parts)))
    assert least_length(parts, tokens) <= len(payload) <= most_length(parts, tokens)
    assert torch.equal(decode_codes(payload, parts, len(widths), tokens, CPU), codes)


def test_the_bytes_are_those_of_the_specification() -> None:
    """One coefficient per width, five tokens."""
    codes = torch.tensor([[0, 1, 2, 3, 900], [14, 15, 0, 1, 2], [254, 255, 509, 510, 65534]])
    streams = encode_codes(codes.int(), packed_columns(torch.tensor([2, 4, 8], dtype=torch.uint8)))
    assert [stream.hex(" ") for stream in streams] == [
        "e4 03",  # 0 1 2 escape | escape
        "fe 10 02",  # 14, escape | 0, 1 | 2
        "fe ff ff ff ff",
        "00 ff",  # 3 - 3, then 900 - 3 is wide
        "00",  # 15 - 15
        "00 fe ff ff",  # 0, 254, 255 (the first wide), 65279
        "82 02 00 00 00 fe",  # 897 - 255, 0, 65279 - 255
    ]


def test_the_largest_level_fits() -> None:
    for width in WIDTHS:
        codes = torch.full((1, 3), 2 * MAX_LEVEL, dtype=torch.int32)
        parts = packed_columns(torch.tensor([width], dtype=torch.uint8))
        payload = bytearray(b"".join(encode_codes(codes, parts)))
        assert len(payload) == most_length(parts, 3)
        assert torch.equal(decode_codes(payload, parts, 1, 3, CPU), codes)


def test_without_coefficients_there_is_no_payload() -> None:
    parts = packed_columns(torch.zeros(0, dtype=torch.uint8))
    assert encode_codes(torch.zeros(0, 5, dtype=torch.int32), parts) == []
    assert decode_codes(bytearray(), parts, 0, 5, CPU).shape == (0, 5)


def test_uneven_escapes_are_refused() -> None:
    parts = packed_columns(torch.tensor([2, 4], dtype=torch.uint8))
    payload = bytearray(b"".join(encode_codes(drawn_codes(2, 16), parts)))
    assert len(payload) > least_length(parts, 16)
    for wrong in (payload[:-1], payload + b"\0", payload[: least_length(parts, 16)]):
        with pytest.raises(ContainerError) as caught:
            decode_codes(bytearray(wrong), parts, 2, 16, CPU)
        assert caught.value.reason == "bounds"
