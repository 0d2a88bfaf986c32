"""What is below KVTC: forms, the rows that a basis is fitted to, and what is counted."""

from __future__ import annotations

import torch

from benchmarks.low_rank_below import HELD_OUT, KVTC, Form, PrefixRows, all_ways
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.evaluation.baselines.fp8 import Fp8
from tests.codec.synthetic import SyntheticModel

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=16, head_size_v=16)
TOKENS = 24


def prefix(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = MODEL.chunk(TOKENS, 0, seed=seed)
    return k.bfloat16(), v.bfloat16()


def test_rows_are_of_all_prefixes_but_their_first_tokens() -> None:
    like = MODEL.artifact((4.0,))
    caches = [prefix(seed) for seed in range(HELD_OUT + 2)]
    rows = PrefixRows(caches, like)
    own = TOKENS - like.sink_tokens
    assert rows.count(heldout=False) == 2 * own
    assert rows.count(heldout=True) == HELD_OUT * own
    assert rows.positions[: own + 1].tolist() == [*range(like.sink_tokens, TOKENS), 4]
    second = torch.arange(own, 2 * own)
    assert torch.equal(rows.cache_rows("v", second, 0, 2), caches[1][1][like.sink_tokens :])
    assert torch.equal(rows.cache_rows("k", second, 1, 2), caches[1][0][like.sink_tokens :, 1:])


def test_a_method_is_stored_alone_and_what_it_leaves_in_blobs() -> None:
    geometry = Geometry(2, 2, 16, 16, ((0, 2),))
    raw = open_codec("raw", torch.bfloat16, geometry=geometry)
    cache = prefix(1)
    forms = {KVTC: Form(None), "fp8-e4m3": Form(Fp8(geometry, torch.bfloat16))}
    codecs = {(method, 8.0): raw for method in forms}
    found = {
        (name, ratio): (stored, back)
        for name, ratio, stored, back in all_ways(forms, codecs, [8.0], cache)
    }
    names = ["kvtc", "fp8-e4m3", "fp8-e4m3+kvtc, plain basis", "fp8-e4m3+kvtc, own basis"]
    assert [name for name, _ in found] == names
    size = sum(x.nbytes for x in cache)
    alone, left = found["fp8-e4m3", 0.0]
    assert size / 2 <= alone < 0.6 * size
    assert not torch.equal(left[1], cache[1])
    for name, kept in (("kvtc", cache), (names[2], left), (names[3], left)):
        stored, back = found[name, 8.0]
        assert size < stored < 1.2 * size
        assert torch.equal(back[0], kept[0])
        assert torch.equal(back[1], kept[1])
