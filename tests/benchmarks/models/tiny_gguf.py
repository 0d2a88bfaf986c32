"""Small GGUF files of random weights, and their values computed without gguf's dequantiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from tests.benchmarks.models.byte_level import BYTES

BLOCK = 32
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
THETA, EPSILON = 5000.0, 1e-5
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "d e", "de f", "Ġ Ġ", "1 2", "12 3")
"""The last two must never be used: digits are split before."""
TOKENS = (*SPECIAL, *BYTES.values(), *(merge.replace(" ", "") for merge in MERGES))
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values, rounded to bfloat16."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def q4_1(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows in Q4_1: bytes, and the values they stand for.

    A block of 32 is a scale and a minimum in float16 and 16 bytes, whose low halves are the first
    16 numbers and whose high halves are the others.
    """
    blocks = (rows, columns // BLOCK)
    scale = rng.uniform(0.01, 0.03, blocks).astype(np.float16)
    least = rng.uniform(-0.3, -0.1, blocks).astype(np.float16)
    packed = rng.integers(0, 256, (*blocks, BLOCK // 2), dtype=np.uint8)
    header = np.stack([scale, least], axis=-1).view(np.uint8)
    codes = np.concatenate([packed % 16, packed // 16], axis=-1).astype(np.float32)
    values = codes * scale[..., None].astype(np.float32) + least[..., None].astype(np.float32)
    raw = np.concatenate([header, packed], axis=-1).reshape(rows, -1)
    return raw, values.reshape(rows, columns)


def q8_0(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows in Q8_0, the same way: a scale in float16 and 32 signed bytes."""
    blocks = (rows, columns // BLOCK)
    scale = rng.uniform(0.001, 0.003, blocks).astype(np.float16)
    codes = rng.integers(-127, 128, (*blocks, BLOCK), dtype=np.int8)
    raw = np.concatenate([scale[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1)
    values = codes.astype(np.float32) * scale[..., None].astype(np.float32)
    return raw.reshape(rows, -1), values.reshape(rows, columns)


def write_llama(
    path: Path,
    quantised: bool = True,
    without: Sequence[str] = (),
    pre: str = "smollm",
    architecture: str = "llama",
    extra_tensor: str | None = None,
) -> dict[str, np.ndarray]:
    """A model of two layers; returns its values by llama.cpp's names, float32.

    quantised: Q4_1 and a tied Q8_0 embedding as in SmolLM2's file, else float32 with a head.
    The other arguments spoil the file: fields left out, another word splitter, another name of
    the architecture, a tensor that no Llama has.
    """
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    _write_metadata(writer, without, pre)
    values: dict[str, np.ndarray] = {}

    def add(name: str, rows: int, columns: int, kind: GGMLQuantizationType) -> None:
        if not quantised:
            values[name] = rng.normal(0, 0.15, (rows, columns)).astype(np.float32)
            writer.add_tensor(name, values[name])
            return
        make = {GGMLQuantizationType.Q4_1: q4_1, GGMLQuantizationType.Q8_0: q8_0}[kind]
        raw, values[name] = make(rng, rows, columns)
        writer.add_tensor(name, raw, raw_dtype=kind)

    def add_norm(name: str) -> None:
        values[name] = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
        writer.add_tensor(name, values[name])

    add("token_embd.weight", len(TOKENS), HIDDEN, GGMLQuantizationType.Q8_0)
    if not quantised:
        add("output.weight", len(TOKENS), HIDDEN, GGMLQuantizationType.Q8_0)
    add_norm("output_norm.weight")
    for layer in range(LAYERS):
        for name, (rows, columns) in _SHAPES.items():
            add(f"blk.{layer}.{name}.weight", rows, columns, GGMLQuantizationType.Q4_1)
        add_norm(f"blk.{layer}.attn_norm.weight")
        add_norm(f"blk.{layer}.ffn_norm.weight")
    if extra_tensor is not None:
        add_norm(extra_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


_SHAPES = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def _write_metadata(writer: GGUFWriter, without: Sequence[str], pre: str) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if "rope.dimension_count" not in without:
        writer.add_rope_dimension_count(HEAD_DIM)
