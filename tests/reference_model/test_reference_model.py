"""The stand-in model loads, speaks its chat format, and its data splits stay apart."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from kvtc_vllm.evaluation.data import corpus, generators

MODEL = Path(__file__).parent / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize(
    "script",
    sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py") if "test" not in p.stem),
)
def test_every_script_finds_what_it_imports(script: str) -> None:
    importlib.import_module(script)


def test_loads_and_generates(tokenizer: PreTrainedTokenizerFast) -> None:
    model = LlamaForCausalLM.from_pretrained(MODEL).eval()
    assert model.dtype == torch.bfloat16
    ids = tokenizer("def main():", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.isfinite(model(ids).logits).all()
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]


def test_chat_template_is_the_training_format(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("My name is Ruth.", "I will remember. Your name is Ruth.")]
    messages = [{"role": "user", "content": turns[0][0]}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == tokenizer.bos_token + "".join(generators.chat_text(turns).answers[0][:1])
    messages.append({"role": "assistant", "content": turns[0][1]})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == tokenizer.bos_token + generators.chat_text(turns).text()


def test_digits_stay_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("4821") == ["4", "8", "2", "1"]


def test_splits_are_disjoint_and_repeatable() -> None:
    assert not set(corpus.code_documents("train")) & set(corpus.code_documents("eval"))
    rng = generators.seeded("eval", 7, "x")
    assert rng.random() == generators.seeded("eval", 7, "x").random()
    assert rng.random() != generators.seeded("train", 7, "x").random()


def test_conversations_state_what_they_ask() -> None:
    for chat in generators.answered_conversations(seed=3, n=5, turns=7):
        seen = ""
        for user, answer in chat:
            assert user.startswith(("Read", "Here")) == (answer == generators.READ)
            assert answer == generators.READ or answer in seen
            seen += user
