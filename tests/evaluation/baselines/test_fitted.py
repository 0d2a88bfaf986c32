"""ThinK, SWAN, LoRC, ReCalKV, DeltaKV: sizes, and small cases worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.deltakv import DeltaKV, nearest_references
from kvtc_vllm.evaluation.baselines.low_rank_projection import (
    LORC_SHARES,
    head_groups,
    log_condition,
    progressive_shares,
)
from kvtc_vllm.evaluation.baselines.statistics import ModelStatistics
from kvtc_vllm.evaluation.methods import find
from kvtc_vllm.evaluation.processes import profiles
from kvtc_vllm.evaluation.processes.profiles import with_profile
from tests.evaluation.baselines.samples import (
    GEOMETRY,
    START,
    make,
    random_cache,
    relative_error,
    reload,
    rope,
    statistics,
    structured_cache,
)

STRIDE, REFERENCES = (int(DeltaKV.settings[name].value) for name in ("stride", "references"))

SIZE, SIZE_V = GEOMETRY.head_size, GEOMETRY.head_size_v
VECTORS = 5 * 2
"""Layers times KV heads."""
FITTED = ("think-40", "think-40-kivi", "swan-16bit", "swan-8bit", "lorc", "recalkv")


def stored(name: str, tokens: int) -> int:
    return sum(map(len, make(name).compress(*random_cache(tokens, torch.bfloat16), START)))


@pytest.mark.parametrize("tokens", [32, 100])
def test_think_drops_two_fifths_of_the_key_channels(tokens: int) -> None:
    kept = round(0.6 * SIZE)
    masks = VECTORS * SIZE // 8
    assert stored("think-40", tokens) == masks + VECTORS * tokens * 2 * (kept + SIZE_V)
    whole, rest = divmod(tokens, 32)
    groups = VECTORS * (whole * kept + tokens * SIZE_V // 32) * (32 * 2 // 8 + 4)
    assert stored("think-40-kivi", tokens) == masks + groups + VECTORS * rest * kept * 2


def test_think_keeps_channels_by_queries_times_keys() -> None:
    """Channel 0 has loud keys that no query reads; channel 1 quiet keys that all queries read."""
    k, v = (torch.ones(40, 5, 2, size, dtype=torch.bfloat16) for size in (SIZE, SIZE_V))
    k[..., 0], k[..., 1] = 100.0, 0.01
    known = statistics()
    queries = torch.ones(5, 2, SIZE, dtype=torch.float64)
    queries[..., 0], queries[..., 1] = 1e-9, 1e9
    method = BASELINES["think-40"](
        GEOMETRY, torch.bfloat16, statistics=replace(known, queries=torch.diag_embed(queries))
    )
    back, values = reload(method, k, v)
    assert not back[..., 0].any()
    assert torch.equal(back[..., 1], k[..., 1])
    assert int((back[0, 0, 0] != 0).sum()) == round(0.6 * SIZE)
    assert torch.equal(values, v)


@pytest.mark.parametrize(("name", "width"), [("swan-16bit", 2), ("swan-8bit", 1)])
def test_swan_stores_half_of_the_coordinates_and_a_bit_each(name: str, width: int) -> None:
    vectors = VECTORS * 33
    assert stored(name, 33) == vectors * sum(
        size // 2 * width + size // 8 for size in (SIZE, SIZE_V)
    )


def test_swan_is_exact_where_half_of_the_directions_are_enough() -> None:
    """Rows in the span of half of the rotation's columns."""
    method = make("swan-16bit", torch.float32)
    rotation = method._rotations[1]
    coordinates = torch.zeros(20, 5, 2, SIZE_V)
    coordinates[..., : SIZE_V // 2] = torch.randn(
        20, 5, 2, SIZE_V // 2, generator=torch.Generator().manual_seed(3)
    )
    v = torch.einsum("tlhe,lhde->tlhd", coordinates, rotation)
    _, back = reload(method, random_cache(20, torch.float32)[0], v)
    assert relative_error(back, v) < 1e-6


def test_swan_keeps_the_largest_coordinates_of_each_token() -> None:
    """Directions of the model are the axes, so coordinates are elements: half of four stay."""
    geometry = Geometry(1, 1, 4, 4, ((0, 1),))
    axes = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])).double().view(1, 1, 4, 4)
    known = replace(statistics(geometry), queries=axes, keys=axes, values=axes)
    method = BASELINES["swan-16bit"](geometry, torch.float32, statistics=known)
    x = torch.tensor([[4.0, -3.0, 0.5, 1.0], [0.25, 1.0, -8.0, 2.0]]).view(2, 1, 1, 4)
    kept = [[4.0, -3.0, 0.0, 0.0], [0.0, 0.0, -8.0, 2.0]]
    for back in reload(method, x, x):
        assert back.view(2, 4).tolist() == kept


def test_lorc_keeps_more_in_early_layers() -> None:
    """Condition numbers e, e, e^2: cumulative logarithms 4, 3, 2; shares linear between."""
    shares = progressive_shares(torch.tensor([1.0, 1.0, 2.0]))
    least, largest = LORC_SHARES
    assert shares.tolist() == pytest.approx([largest, (least + largest) / 2, least])
    weights = torch.diag_embed(torch.tensor([[4.0, 2.0, 1.0]])).double()
    assert float(log_condition(weights @ weights.mT)) == pytest.approx(
        torch.tensor(4.0).log().item()
    )


def test_lorc_is_exact_where_its_directions_are_enough() -> None:
    """Keys and values that a projection of low rank makes; keys rotated after it."""
    ropes = (rope(),) * 5
    generator = torch.Generator().manual_seed(5)
    known = statistics()
    rank_k, rank_v = (round(LORC_SHARES[0] * 2 * size) for size in (SIZE, SIZE_V))
    left_k = torch.randn(5, 2 * SIZE, rank_k, generator=generator).double()
    left_v = torch.randn(5, 2 * SIZE_V, rank_v, generator=generator).double()
    known = replace(known, key_weights=left_k @ left_k.mT, value_weights=left_v @ left_v.mT)
    method = BASELINES["lorc"](GEOMETRY, torch.float32, ropes, statistics=known)
    hidden = torch.randn(30, 5, max(rank_k, rank_v), generator=generator)
    plain = torch.einsum("tlr,lwr->tlw", hidden[..., :rank_k], left_k.float())
    v = torch.einsum("tlr,lwr->tlw", hidden[..., :rank_v], left_v.float()).view(30, 5, 2, SIZE_V)
    positions = torch.arange(START, START + 30)
    k = rope().apply(plain.view(30, 5, 2, SIZE), positions)
    for back, original in zip(reload(method, k, v), (k, v), strict=True):
        assert relative_error(back, original) < 1e-5  # float16 coordinates


def test_recalkv_groups_heads_that_are_alike() -> None:
    """Of five heads, 0, 2 and 4 are the same; 1 and 3 are others. The first four share a group."""
    generator = torch.Generator().manual_seed(0)
    one, two, three = (torch.randn(200, 8, generator=generator) for _ in range(3))
    rows = torch.cat((one, two, one, three, one), dim=1).double()
    groups = head_groups(rows.T @ rows, 5)
    assert [len(group) for group in groups] == [4, 1]
    assert groups[0][:3] == [0, 2, 4]


def test_recalkv_takes_half_of_the_width() -> None:
    assert stored("recalkv", 10) == 10 * 5 * (SIZE + SIZE_V) * 2


def test_recalkv_is_exact_where_its_directions_are_enough() -> None:
    """Calibrated on rows of half of the width; keys rotated after that."""
    ropes = (rope(),) * 5
    generator = torch.Generator().manual_seed(5)
    rows = {
        size: torch.einsum(
            "tlr,lrw->tlw",
            torch.randn(200, 5, size, generator=generator),
            torch.randn(5, size, 2 * size, generator=generator),
        )
        for size in (SIZE, SIZE_V)
    }
    moments = {size: torch.einsum("tlw,tlx->lwx", x, x).double() for size, x in rows.items()}
    known = replace(statistics(), key_rows=moments[SIZE], value_rows=moments[SIZE_V])
    method = BASELINES["recalkv"](GEOMETRY, torch.float32, ropes, statistics=known)
    k, v = (rows[size][:30].reshape(30, 5, 2, size) for size in (SIZE, SIZE_V))
    k = rope().apply(k, torch.arange(START, START + 30))
    for back, original in zip(reload(method, k, v), (k, v), strict=True):
        assert relative_error(back, original) < 1e-5  # float16 coordinates
    other = random_cache(30, torch.float32)[1]
    assert relative_error(reload(method, k, other)[1], other) > 0.3


def test_deltakv_finds_the_nearest_earlier_references() -> None:
    references = torch.tensor([[0.0], [10.0], [20.0], [30.0], [40.0], [50.0]])
    rows = torch.tensor([[1.0], [49.0], [24.0]])
    tokens = torch.tensor([STRIDE - 1, 5 * STRIDE + 1, 4 * STRIDE + 1])
    chosen = nearest_references(rows, references, tokens, STRIDE, REFERENCES)
    assert chosen.shape == (3, REFERENCES)
    assert set(chosen[0].tolist()) == {0}  # no other is earlier
    assert set(chosen[1].tolist()) == {5, 4, 3, 2}
    assert set(chosen[2].tolist()) == {2, 3, 1, 4}


def test_deltakv_is_nearly_free_for_tokens_that_repeat() -> None:
    """A text of ten rows again and again: every residual to the mean of equal references is 0."""
    k, v = structured_cache(STRIDE)
    k, v = (x.repeat(40, 1, 1, 1) for x in (k, v))
    # One period longer than the stride, so that each row comes to be a reference.
    order = torch.arange(len(k)) % (STRIDE + 1) % STRIDE
    k, v = k[order], v[order]
    back = reload(make("deltakv"), k, v)
    late = slice(-50, None)
    assert relative_error(back[0][late], k[late]) < 0.3 * relative_error(back[0][:50], k[:50])


def test_deltakv_keeps_sinks_whole_if_asked() -> None:
    """Tokens 0 and 10 are references as well. A sink costs what a reference does, and no code."""
    k, v = random_cache(100, torch.bfloat16)
    plain, more = (make("deltakv", sinks=sinks) for sinks in (0, 12))
    for back, original in zip(reload(more, k, v), (k, v), strict=True):
        assert torch.equal(back[:12], original[:12])
        assert not torch.equal(back[12:20], original[12:20])
    without, with_sinks = (sum(map(len, m.compress(k, v, START))) for m in (plain, more))
    width = 2 * (SIZE + SIZE_V)
    code = width // 32 * (32 * 2 // 8 + 4) + REFERENCES * 4 // 8
    assert with_sinks - without == 5 * 10 * (width * 2 - code)


@pytest.mark.parametrize("name", FITTED)
def test_statistics_of_another_shape_are_refused(name: str) -> None:
    other = Geometry(5, 1, SIZE, SIZE_V, ((0, 5),))
    with pytest.raises(ValueError, match=r"statistics: keys has shape \(5, 2, 64, 64\)"):
        BASELINES[name](other, torch.bfloat16, statistics=statistics())


def test_text_that_is_given_takes_the_place_of_our_own(tmp_path: Path) -> None:
    """Plain text and chats of all files, cut to one length, in an order that mixes kinds."""
    plain = [f"text {number} " + "x" * 2000 for number in range(profiles.TEXT_PROMPTS)]
    chats = [f"chat {number}" for number in range(profiles.TEXT_PROMPTS)]
    lines = [json.dumps({"text": text}) for text in plain]
    lines += [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in chats]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))

    class Characters:
        bos_token_id = None

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return list(map(ord, text))

        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            return f"user: {messages[0]['content']}"

    found = ["".join(map(chr, ids)) for ids in profiles._prompts(Characters(), [str(path)])]
    assert len(found) == profiles.TEXT_PROMPTS
    assert max(map(len, found)) == profiles.PROMPT_TOKENS
    whole = [text[: profiles.PROMPT_TOKENS] for text in plain] + [f"user: {t}" for t in chats]
    assert set(found) < set(whole)
    assert {text.split()[0] for text in found} == {"text", "user:"}


def test_statistics_are_those_of_the_cache(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the cache that transformers itself returns, and its weights."""
    from transformers import AutoModelForCausalLM

    prompt = list(range(5, 45))
    monkeypatch.setattr(
        "kvtc_vllm.evaluation.processes.profiles._prompts",
        lambda tokenizer, texts: [prompt, prompt[:9]],
    )
    method = with_profile(find("lorc"), str(reference_model), tmp_path)
    again = with_profile(find("think-40"), str(reference_model), tmp_path)
    path = method.override["options"]["statistics"]
    assert again.override["options"]["statistics"] == path
    known = ModelStatistics.load(Path(path))
    network = AutoModelForCausalLM.from_pretrained(reference_model, dtype=torch.float32).eval()
    keys = values = 0.0
    with torch.inference_mode():
        for ids in (prompt, prompt[:9]):
            layer = network(torch.tensor([ids]), use_cache=True).past_key_values.layers[1]
            keys = keys + layer.keys[0].double().mT @ layer.keys[0].double()
            values = values + layer.values[0].double().mT @ layer.values[0].double()
    torch.testing.assert_close(known.keys[1], keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(known.values[1], values, rtol=1e-4, atol=1e-4)
    size = keys.shape[-1]
    # A rotation keeps the sum of squares; the rows' blocks of heads are those of the heads.
    blocks = known.key_rows[1].unflatten(0, (-1, size)).unflatten(-1, (-1, size))
    for head in range(keys.shape[0]):
        assert float(blocks[head, :, head].trace()) == pytest.approx(
            float(keys[head].trace()), rel=1e-4
        )
    weight = network.model.layers[1].self_attn.k_proj.weight.double()
    torch.testing.assert_close(known.key_weights[1], weight @ weight.T, rtol=1e-6, atol=1e-6)
    assert known.queries.shape == known.keys.shape
    assert float(known.queries[1, 0].trace()) > 0
