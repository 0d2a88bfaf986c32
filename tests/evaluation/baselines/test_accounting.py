"""What every baseline is charged: formulas by hand for a chunk, and that no byte is in vain."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch

from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.low_rank_projection import log_condition, progressive_shares
from kvtc_vllm.evaluation.replay.baseline_codec import BaselineCodec
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    make,
    random_cache,
    statistics,
    structured_cache,
    views,
)

TOKENS = 100
LAYERS, HEADS = GEOMETRY.num_layers, GEOMETRY.num_kv_heads
SIZE, SIZE_V = GEOMETRY.head_size, GEOMETRY.head_size_v
VECTORS = LAYERS * HEADS * TOKENS
"""Of keys, and as many of values."""
ELEMENTS = VECTORS * (SIZE + SIZE_V)
WHOLE = LAYERS * HEADS * SIZE * 64
"""Keys of the whole groups of 64 tokens."""
TAIL = LAYERS * HEADS * SIZE * 36 * 2
"""Bytes of the others, in 16 bits."""


def groups(elements: int, size: int, bits: int) -> int:
    """Codes, and a zero point and a scale of 16 bits for every `size` elements."""
    return elements * bits // 8 + elements // size * 4


def kivi(bits: int, channels: int = SIZE) -> int:
    keys = LAYERS * HEADS * channels
    return groups(keys * 96, 32, bits) + keys * 4 * 2 + groups(VECTORS * SIZE_V, 32, bits)


def gear(bits: int) -> int:
    """No end of 1 % of 64 elements is an outlier."""
    factors = LAYERS * HEADS * 4 * (64 + SIZE + TOKENS + SIZE_V) * 2
    return groups(WHOLE, 64, bits) + TAIL + groups(VECTORS * SIZE_V, 64, bits) + factors


def xkv() -> int:
    """Groups of four layers and of one."""
    widths = [n * HEADS * size for n in (4, 1) for size in (SIZE, SIZE_V)]
    shares = (1 / 8, 3 / 16) * 2
    return sum(round(w * s) * (TOKENS + w) * 2 for w, s in zip(widths, shares, strict=True))


def quantspec(levels: int) -> int:
    parameters = (LAYERS * HEADS * SIZE + VECTORS) * 4
    return ELEMENTS * levels // 2 + parameters


def lorc() -> int:
    known = statistics()
    logs = log_condition(known.key_weights) + log_condition(known.value_weights)
    shares = progressive_shares(logs).tolist()
    ranks = [round(share * HEADS * size) for share in shares for size in (SIZE, SIZE_V)]
    return sum(ranks) * TOKENS * 2


def deltakv() -> int:
    """Ten references, whose numbers take four bits; 90 tokens have four of them each."""
    width = HEADS * (SIZE + SIZE_V)
    return LAYERS * (10 * width * 2 + 90 * 4 * 4 // 8 + groups(90 * width, 32, 2))


def outliers(sixteenths: int) -> int:
    """Bits per element in sixteenths, two norms per vector, a bit per channel."""
    return ELEMENTS * sixteenths // 128 + 2 * VECTORS * 2 * 2 + LAYERS * HEADS * 96 // 8


FORMULAS: dict[str, Callable[[], int]] = {
    "fp8-e4m3": lambda: ELEMENTS,
    "kivi-2bit": lambda: kivi(2),
    "kivi-4bit": lambda: kivi(4),
    "gear-2bit": lambda: gear(2),
    "gear-4bit": lambda: gear(4),
    "xkv": xkv,
    "turboquant-4bit": lambda: ELEMENTS // 2 + 2 * VECTORS * 2,
    "turboquant-3bit": lambda: ELEMENTS * 3 // 8 + 2 * VECTORS * 2,
    "turboquant-3.5bit": lambda: outliers(56),
    "turboquant-2.5bit": lambda: outliers(36),
    "quantspec-8bit": lambda: quantspec(2),
    "quantspec-4bit": lambda: quantspec(1),
    "think-40": lambda: VECTORS * (38 + SIZE_V) * 2 + LAYERS * HEADS * SIZE // 8,
    "think-40-kivi": lambda: kivi(2, 38) + LAYERS * HEADS * SIZE // 8,
    "swan-16bit": lambda: ELEMENTS // 2 * 2 + ELEMENTS // 8,
    "swan-8bit": lambda: ELEMENTS // 2 + ELEMENTS // 8,
    "lorc": lorc,
    "recalkv": lambda: ELEMENTS // 2 * 2,
    "deltakv": deltakv,
}
BY_CONTENT = {"cachegen", "cachegen-lmcache", "joint-fusion", "joint-fusion-strict"}
"""What these store depends on what is in the chunk; their own tests have cases."""


def test_every_method_has_a_formula_or_goes_by_content() -> None:
    assert FORMULAS.keys() | BY_CONTENT == BASELINES.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_a_chunk_takes_the_bytes_of_the_formula(name: str) -> None:
    """Whatever is in it: noise and a structured cache."""
    for k, v in (random_cache(TOKENS, torch.bfloat16), structured_cache(TOKENS)):
        parts = make(name).compress(k, v, START)
        assert sum(map(len, parts)) == FORMULAS[name]()


@pytest.mark.parametrize("name", BASELINES)
def test_a_blob_is_charged_a_header_and_all_parts(name: str) -> None:
    k, v = structured_cache(TOKENS)
    method = make(name)
    parts = method.compress(k, v, START)
    framing = HEADER_BYTES + CHECKSUM_BYTES + 4 * (1 + len(parts))
    assert len(BaselineCodec(method).encode(k, v, START)) == framing + sum(map(len, parts))


@pytest.mark.parametrize("name", BASELINES)
def test_every_part_tells_something(name: str) -> None:
    """Four bytes in the middle of a part are wrong: other K and V come back, or none. So nothing is
    charged that the method could do without."""
    k, v = structured_cache(TOKENS)
    method = make(name)
    parts = method.compress(k, v, START)
    right = torch.cat([x.float().flatten() for x in method.restore(views(parts), TOKENS, START)])
    for number, part in enumerate(parts):
        if not part:
            continue
        wrong = bytearray(part)
        for at in range(len(part) // 2, min(len(part) // 2 + 4, len(part))):
            wrong[at] ^= 0xFF
        changed = [*parts[:number], bytes(wrong), *parts[number + 1 :]]
        try:
            back = method.restore(views(changed), TOKENS, START)
        except (ValueError, RuntimeError, IndexError, AssertionError, zlib.error):
            continue
        assert not torch.equal(torch.cat([x.float().flatten() for x in back]), right), number
