"""Gradients in transformers, of a tiny model: against differences of its own likelihood."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvtc_vllm.calibration import gradients
from kvtc_vllm.calibration.capture import CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord, CaptureSource
from kvtc_vllm.calibration.differentiable import GRADIENTS, CacheShape, Differentiable
from kvtc_vllm.calibration.documents import DataError, Document
from kvtc_vllm.calibration.gradients import (
    GradientSettings,
    draw_documents,
    measure_sensitivity,
    spool_sensitivity,
)
from kvtc_vllm.calibration.in_transformers import check_supported
from kvtc_vllm.calibration.sensitivity import load_sensitivity
from kvtc_vllm.calibration.spool import SpoolWriter
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.offload.reach import FULL, SlidingWindow
from tests.calibration.test_sensitivity import SOURCE
from tests.calibration.toy import HEADS, LAYERS, SIZE, toy_header, toy_rope

SHAPE = CacheShape(LAYERS, HEADS, SIZE, SIZE)
VOCABULARY = 32


class Letters:
    """A tokeniser of one token per letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % VOCABULARY for letter in text]


TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
"""Shape of the toy, with random weights large enough to predict something."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the toy's shape, with random weights large enough to predict something."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Letters())


IDS = [(7 * i * i + 3) % VOCABULARY for i in range(40)]
PREFIX = 30


@pytest.mark.usefixtures("letters")
def test_gradients_are_the_slopes_of_the_likelihood(model: Path) -> None:
    (gradients_,) = Differentiable(model, "cpu").gradients(
        IDS, PREFIX, [SHAPE], torch.Generator().manual_seed(3)
    )
    keys, values = gradients_.energies()
    assert keys.shape == values.shape == (LAYERS, HEADS, PREFIX)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokens = torch.tensor([IDS])

    def likelihood(
        which: str = "keys", at: tuple[int, ...] = (0, 0, 0, 0), step: float = 0.0
    ) -> torch.Tensor:
        """Of all labels at all places, with a step at (layer, head, token, element) of K or V."""
        layer, *place = at
        cache = DynamicCache()
        with torch.no_grad():
            network(input_ids=tokens[:, :PREFIX], past_key_values=cache)
            getattr(cache.layers[layer], which)[0][tuple(place)] += step
            logits = network(input_ids=tokens[:, PREFIX:], past_key_values=cache).logits[0]
        return torch.log_softmax(logits, dim=-1)

    chances = likelihood().exp().float()
    labels = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(3))
    for which, found, layer, token in (("values", values, 1, 20), ("keys", keys, 2, 29)):
        for head in range(HEADS):
            squares = 0.0
            for element in range(SIZE):
                at = (layer, head, token, element)
                # Norms are of float32: smaller steps would drown.
                above, below = (likelihood(which, at, step) for step in (1e-2, -1e-2))
                slope = (above - below).gather(1, labels).sum() / 2e-2
                squares += float(slope) ** 2
            assert float(found[layer, head, token]) == pytest.approx(squares, rel=1e-2)
    cache = DynamicCache()
    with torch.no_grad():
        network(input_ids=tokens[:, :PREFIX], past_key_values=cache)
    exact = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers], dim=1)
    assert torch.allclose(gradients_.cached_values.double(), exact, atol=1e-4)


@pytest.mark.usefixtures("letters")
def test_layers_with_a_window_are_differentiated_within_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        **TINY,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    (found,) = Differentiable(tmp_path, "cpu").gradients(
        IDS, PREFIX, [SHAPE], torch.Generator().manual_seed(0)
    )
    for squares in found.energies():
        assert not squares[..., : PREFIX - 8].any(), "no later token sees these"
        assert bool((squares[..., -7:] > 0).all())


GROUPS = (
    replace(SHAPE, layers=1, numbers=(2,)),
    replace(SHAPE, layers=LAYERS - 1, numbers=(0, 1, 3), reach=SlidingWindow(8)),
)
"""Full attention in the third layer, windows in the others."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of these groups."""
    directory = tmp_path_factory.mktemp("models") / "mixed"
    torch.manual_seed(0)
    kinds = ["sliding_attention"] * LAYERS
    kinds[2] = "full_attention"
    config = Gemma3TextConfig(
        **TINY, query_pre_attn_scalar=SIZE, sliding_window=8, layer_types=kinds
    )
    Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.usefixtures("letters")
def test_cache_groups_have_the_gradients_of_their_layers(mixed: Path) -> None:
    differentiable = Differentiable(mixed, "cpu")
    (whole,) = differentiable.gradients(IDS, PREFIX, [SHAPE], torch.Generator().manual_seed(0))
    parts = differentiable.gradients(IDS, PREFIX, GROUPS, torch.Generator().manual_seed(0))
    for shape, part in zip(GROUPS, parts, strict=True):
        layers = list(shape.numbers)
        for found, every in zip(part.energies(), whole.energies(), strict=True):
            assert torch.equal(found, every[layers])
            assert bool((found[..., : PREFIX - 8] > 0).any()) == (shape.reach == FULL)
        assert torch.equal(part.cached_values, whole.cached_values[:, layers])
    with pytest.raises(ArtifactError, match="its cache has 4 layers"):
        differentiable.gradients(IDS, PREFIX, GROUPS[:1], torch.Generator())


@pytest.mark.usefixtures("letters")
def test_averages_are_over_what_a_window_sees(mixed: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog. " * 20]
    source = msgspec.structs.replace(SOURCE, documents=2, max_len=90, prefix_tokens=60)
    groups = [(shape, None) for shape in GROUPS]
    full, windows = measure_sensitivity(mixed, texts, groups, source, total_tokens=400)
    assert (len(full.all_tokens.keys), len(windows.all_tokens.keys)) == (1, LAYERS - 1)
    assert full.all_tokens.tokens == 2 * (60 - source.sink_tokens)
    assert windows.all_tokens.tokens == 2 * (8 - 1)


@pytest.mark.usefixtures("letters")
def test_documents_of_nothing_but_sinks_are_refused(model: Path) -> None:
    source = msgspec.structs.replace(SOURCE, max_len=4)
    with pytest.raises(DataError, match="documents of 4 tokens have none past the 4 sinks"):
        measure_sensitivity(model, ["words " * 20], [(SHAPE, None)], source, total_tokens=100)


@pytest.mark.usefixtures("letters")
def test_marked_tokens_are_left_out_of_the_ordinary_ones(model: Path) -> None:
    """By a rule that marks a fifth of the tokens."""
    texts = ["the quick brown fox jumps over the lazy dog. " * 20]
    source = msgspec.structs.replace(SOURCE, documents=2, max_len=90, prefix_tokens=60)
    settings: dict[str, Any] = {"total_tokens": 400}
    (everything,) = measure_sensitivity(model, texts, [(SHAPE, None)], source, **settings)
    assert everything.marked is None
    rule = SinkRule((0, 2), 100.0, max_share=0.2)
    (found,) = measure_sensitivity(model, texts, [(SHAPE, rule)], source, **settings)
    assert found.all_tokens == everything.all_tokens
    assert found.ordinary is not None
    assert found.marked is not None
    marked = found.all_tokens.tokens - found.ordinary.tokens
    assert marked == 2 * math.ceil(0.2 * 56)
    assert found.marked.share == marked / found.all_tokens.tokens
    every, ordinary = (
        sum(x for row in (*average.keys, *average.values) for x in row) * average.tokens
        for average in (found.all_tokens, found.ordinary)
    )
    assert found.marked.energy == pytest.approx(1 - ordinary / every)
    assert 0 < found.marked.energy < 1


@pytest.mark.usefixtures("letters")
def test_a_cache_of_another_shape_is_refused(model: Path) -> None:
    differentiable = Differentiable(model, "cpu")
    for shape in (replace(SHAPE, layers=3), replace(SHAPE, head_size_v=4)):
        with pytest.raises(ArtifactError, match=r"cannot run tiny .*give --sensitivity probe"):
            differentiable.gradients(IDS, PREFIX, [shape], torch.Generator())


def test_a_model_that_transformers_does_not_know_is_refused(model: Path, tmp_path: Path) -> None:
    check_supported(model, GRADIENTS)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    for call in (
        lambda path: check_supported(path, GRADIENTS),
        lambda path: Differentiable(path, "cpu"),
    ):
        with pytest.raises(ArtifactError, match=r"--sensitivity gradient: transformers cannot run"):
            call(tmp_path)
    # Known, but nothing that predicts the next token.
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ArtifactError, match="no causal language model for ViTConfig"):
        check_supported(tmp_path, GRADIENTS)


def test_long_documents_that_are_not_held_out_are_drawn() -> None:
    documents = [Document(i, [0] * (100 if i % 3 else 40), i % 5 == 4) for i in range(30)]
    drawn = draw_documents(documents, SOURCE)
    assert [d.doc for d in drawn] == sorted(d.doc for d in drawn)
    assert len(drawn) == SOURCE.documents
    assert all(len(d.token_ids) == 100 and not d.heldout for d in drawn)
    assert draw_documents(documents, SOURCE) == drawn
    few = [d for d in documents if len(d.token_ids) == 40][:2]
    assert draw_documents(few, SOURCE) == few


@pytest.mark.usefixtures("letters")
def test_a_spool_is_measured_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "PREFILL_FACTOR", 1)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    capture = CaptureSettings(
        model=str(model), data=(str(text),), tokens=2500, max_len=300, heldout_fraction=0.2
    )
    source = CaptureSource(
        model="c-d",
        tokenizer="",
        texts="",
        tokens=2500,
        max_len=300,
        sink_tokens=4,
        heldout_fraction=0.2,
        seed=0,
        engine={},
    )
    record = CaptureRecord(
        model_name="tiny", files=("text.txt",), tp_size=1, source=source, tokens_run=2500
    )
    spool = tmp_path / "spool"
    header = toy_header(geometry=Geometry(LAYERS, HEADS, SIZE, SIZE, ((0, LAYERS),)))
    with SpoolWriter(spool / "rank0", header, (toy_rope(),)) as writer:
        rows = torch.zeros(2, LAYERS, HEADS, SIZE, dtype=torch.bfloat16)
        writer.append(rows, rows, torch.arange(4, 6), 0, False)
    said: list[str] = []
    settings = GradientSettings(documents=4, prefix_tokens=80, continuation_tokens=20)

    def measure(settings: GradientSettings) -> tuple[tuple[float, ...], ...]:
        path = spool_sensitivity(capture, record, spool, settings, "cpu", said.append)
        found = load_sensitivity(path, LAYERS, HEADS)
        assert len(found.documents) == settings.documents
        assert found.ordinary is None, "the spool's rows show no sinks"
        assert found.all_tokens.tokens == settings.documents * (settings.prefix_tokens - 4)
        numbers = (*found.all_tokens.keys, *found.all_tokens.values)
        assert min(map(min, numbers)) > 0
        return numbers

    first = measure(settings)
    assert "used again" not in said[-1]
    assert measure(settings) == first
    assert "used again" in said[-1]
    (spool / "sensitivity.json").unlink()
    assert measure(settings) == first, "equal seeds give equal numbers"
    assert measure(replace(settings, documents=3)) != first
    assert "used again" not in said[-1]
