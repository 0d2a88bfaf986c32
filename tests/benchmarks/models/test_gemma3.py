"""Gemma 3 GGUF files: a random model of transformers written as one, and read back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="conversion needs gguf: pip install 'kvtc-vllm[dev]'")

from gguf import GGUFWriter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerBase,
)

from benchmarks.models.convert import convert

LAYERS, WINDOW = 7, 8
PIECES = ("\N{LOWER ONE EIGHTH BLOCK}", *"abcdehnst1234")
WORDS = ("th", "▁t", "he", "▁a", "the", "▁the", "an", "and", "nd", "▁and", "es", "st", "12", "ab")
"""Best score first. Some can be made in several ways."""
CONTROL, PLAIN = ("<pad>", "<eos>", "<bos>", "<unk>"), ("\n", "\n\n", "  ", "   ", "<b>")
TOKENS = (*CONTROL, *PLAIN, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *WORDS)
SCORES = {word: -float(rank) for rank, word in enumerate(WORDS)}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}


@pytest.fixture(scope="module")
def original() -> Gemma3ForCausalLM:
    """Random weights that bfloat16 holds exactly; layer types and RoPE bases are Gemma's own."""
    config = Gemma3TextConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms in steps of 1/128: both the weight and one more have few digits.
            step = torch.randint(-64, 64, parameter.shape) / 128
            parameter.copy_(step if name.endswith("norm.weight") else step / 2)
    return model


@pytest.fixture(scope="module")
def converted(original: Gemma3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gemma3")
    _write(directory / "tiny.gguf", original)
    out = directory / "model"
    out.mkdir()
    convert(directory / "tiny.gguf", out)
    return out


@pytest.fixture(scope="module")
def tokenizer(converted: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(converted)


def test_weights_and_logits_are_the_original(original: Gemma3ForCausalLM, converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    expected = original.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    ids = torch.arange(5 * WINDOW)[None] * 13 % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_one_layer_in_six_has_no_window(converted: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(converted).config
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [5]
    bases = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert bases == {"sliding_attention": 10000.0, "full_attention": 1000000.0}


def test_ids_are_those_of_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("abdehnst124 é東", k=rng.randrange(1, 24)))
        text = text.replace("  ", " ")  # runs of spaces are tokens by themselves
        assert tokenizer(text).input_ids == [2, *_sentencepiece(text)], text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the and", ["the", "▁and"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("a  b   c", ["a", "  ", "b", "   ", "c"]),
        ("<b>a", ["<b>", "a"]),
        ("é", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_tokens(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[str]) -> None:
    assert tokenizer.tokenize(text, add_special_tokens=False) == tokens
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def _sentencepiece(text: str) -> list[int]:
    """SentencePiece's BPE: join the neighbours with the best score, the left ones if equal."""
    symbols = list(text.replace(" ", PIECES[0]))
    while True:
        joined = [a + b for a, b in pairwise(symbols)]
        known = [i for i, token in enumerate(joined) if token in SCORES]
        if not known:
            break
        at = max(known, key=lambda i: (SCORES[joined[i]], -i))
        symbols[at : at + 2] = [joined[at]]
    ids = []
    for symbol in symbols:
        bytes_ = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        ids += [TOKENS.index(t) for t in ([symbol] if symbol in TOKENS else bytes_)]
    return ids


def _write(path: Path, model: Gemma3ForCausalLM) -> None:
    config = model.config
    writer = GGUFWriter(path, "gemma3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_sliding_window(WINDOW)
    writer.add_rope_freq_base(1000000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(TOKENS))
    writer.add_token_scores([SCORES.get(token, -1000.0) for token in TOKENS])
    writer.add_token_types([_type(token) for token in TOKENS])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        own = ".".join(parts[2:]) if prefix else parts[0]
        stored = value + 1 if name.endswith("norm.weight") else value
        writer.add_tensor(f"{prefix}{NAMES[own]}.weight", stored.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type(token: str) -> int:
    if token in CONTROL:
        return 3
    if token in PLAIN:
        return 4
    return 6 if token.startswith("<0x") else 1
