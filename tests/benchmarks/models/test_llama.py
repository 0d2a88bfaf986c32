"""Llama GGUF files: weights, configuration and tokenizer, against computations of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="conversion needs gguf: pip install 'kvtc-vllm[dev]'")

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import ModelError
from benchmarks.models.architectures.llama import unpermute
from benchmarks.models.convert import convert
from tests.benchmarks.models import byte_level, tiny_gguf

TEXTS = (
    "12345",
    "in 1234 the def",
    "def f(x):\n    return [x ** 2 for x in the_list]  # 10",
    "don't they'll I'd we're\t\n\n  x",
    "naïve ½ café ² 東京 😀",
    "<|im_start|>user\nthe 12<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module", params=[True, False], ids=["Q4_1 and Q8_0", "F32"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A converted directory, and what the GGUF file holds."""
    directory = tmp_path_factory.mktemp("llama")
    values = tiny_gguf.write_llama(directory / "tiny.gguf", quantised=request.param)
    out = directory / "model"
    out.mkdir()
    convert(directory / "tiny.gguf", out)
    return out, values


def test_logits_are_those_of_the_file(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    directory, values = converted
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = np.random.default_rng(1).integers(0, len(tiny_gguf.TOKENS), 40)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    expected = _logits({n: tiny_gguf.as_bfloat16(v) for n, v in values.items()}, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_weights_are_stored_in_bfloat16(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted[0])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == ("output.weight" not in converted[1])


def test_rows_of_a_head_are_unpermuted() -> None:
    heads, half = 3, 4
    stored = torch.arange(heads * 2 * half * 5.0).reshape(heads * 2 * half, 5)
    found = unpermute(stored, heads)
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half
            assert torch.equal(found[first + i], stored[first + 2 * i])
            assert torch.equal(found[first + half + i], stored[first + 2 * i + 1])


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids(converted: tuple[Path, dict[str, np.ndarray]], text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    vocabulary = {token: i for i, token in enumerate(tiny_gguf.TOKENS)}
    merges = [(a, b) for a, _, b in (merge.partition(" ") for merge in tiny_gguf.MERGES)]
    expected = byte_level.encode(text, vocabulary, merges, tiny_gguf.SPECIAL)
    assert tokenizer(text).input_ids == expected
    assert tokenizer.decode(expected) == text


def test_each_digit_is_a_token(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


def test_chat_template_and_special_tokens(
    converted: tuple[Path, dict[str, np.ndarray]],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    chat = [{"role": "user", "content": "the 12"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe 12<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    generation = json.loads((converted[0] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_numbers_of_the_configuration(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["rms_norm_eps"] == tiny_gguf.EPSILON  # not 0.000009999999747378752
    assert config["rope_theta"] == tiny_gguf.THETA
    assert config["max_position_embeddings"] == 256
    assert config["vocab_size"] == len(tiny_gguf.TOKENS)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture is 'mamba'; only llama, gemma3"),
        ({"without": ["rope.dimension_count"]}, "no field 'llama.rope.dimension_count'"),
        ({"pre": "llama-bpe"}, "'gpt2' and 'llama-bpe'; only 'gpt2' and 'smollm'"),
        ({"extra_tensor": "rope_freqs.weight"}, "tensor 'rope_freqs.weight' is not known"),
        ({"extra_tensor": "blk.0.attn_q.bias"}, "tensor 'blk.0.attn_q.bias' is not known"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, spoilt: dict[str, Any], message: str) -> None:
    tiny_gguf.write_llama(tmp_path / "tiny.gguf", **spoilt)
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path)


def _logits(values: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Llama in float32 as llama.cpp computes it: rows as stored, neighbours rotated."""
    t = tiny_gguf
    x = values["token_embd.weight"][ids]
    for layer in range(t.LAYERS):

        def weight(name: str, layer: int = layer) -> np.ndarray:
            return values[f"blk.{layer}.{name}.weight"]

        h = _norm(x, weight("attn_norm"))
        q = _rotate((h @ weight("attn_q").T).reshape(len(ids), t.HEADS, t.HEAD_DIM))
        k = _rotate((h @ weight("attn_k").T).reshape(len(ids), t.KV_HEADS, t.HEAD_DIM))
        v = (h @ weight("attn_v").T).reshape(len(ids), t.KV_HEADS, t.HEAD_DIM)
        x = x + _attend(q, k, v) @ weight("attn_output").T
        h = _norm(x, weight("ffn_norm"))
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    head = values.get("output.weight", values["token_embd.weight"])
    return _norm(x, values["output_norm.weight"]) @ head.T


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + tiny_gguf.EPSILON) * weight


def _rotate(x: np.ndarray) -> np.ndarray:
    """x: [tokens, heads, head_dim]."""
    frequency = tiny_gguf.THETA ** (-np.arange(0, tiny_gguf.HEAD_DIM, 2) / tiny_gguf.HEAD_DIM)
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(np.float32)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    tokens, heads, size = q.shape
    out = np.empty_like(q)
    for head in range(heads):
        shared = head * k.shape[1] // heads
        scores = q[:, head] @ k[:, shared].T / np.sqrt(size)
        scores[np.triu_indices(tokens, 1)] = -np.inf
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = share / share.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(tokens, heads * size)
