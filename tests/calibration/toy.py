"""A toy model for the calibration tests: shape, RoPE, and rows with a decaying spectrum."""

from __future__ import annotations

import torch

from kvtc_vllm.artifact.card import DataCard
from kvtc_vllm.artifact.identity import ModelIdentity
from kvtc_vllm.calibration.spool import SpoolHeader
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.rope import Rope

LAYERS, HEADS, SIZE, SIZE_V = 4, 2, 8, 4
DOCS, DOC_TOKENS = 5, 300
RATIOS = (2.0, 4.0, 8.0)
RANK_FILE = "rank0of1.safetensors"
IDENTITY = ModelIdentity(config="c" * 32, weights="d" * 32)
DATA = DataCard(files=("a.txt",), tokens=1500, train_tokens=1200, heldout_tokens=300, seed=0)


def toy_rope(positions: int = 512) -> Rope:
    angles = torch.arange(positions)[:, None] / 100 ** (torch.arange(SIZE // 2) / (SIZE // 2))
    return Rope(torch.cat((angles.cos(), angles.sin()), dim=-1).to(torch.bfloat16))


def toy_rows(size: int, seed: int) -> torch.Tensor:
    """float32 [docs, tokens, L, H, size]: a decaying spectrum in a random basis, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    p = LAYERS * HEADS * size
    spectrum = torch.logspace(0.5, -1.5, p)
    directions = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
    coefficients = torch.randn(DOCS * DOC_TOKENS, p, generator=generator) * spectrum
    rows = coefficients @ directions.T + torch.randn(p, generator=generator)
    return rows.reshape(DOCS, DOC_TOKENS, LAYERS, HEADS, size)


def toy_header(**changes: object) -> SpoolHeader:
    fields: dict = {
        "geometry": Geometry(LAYERS, HEADS, SIZE, SIZE_V, ((0, 2), (2, 4))),
        "total_kv_heads": HEADS,
        "dtype": "bfloat16",
        "layer_names": tuple(f"layers.{i}.attn" for i in range(LAYERS)),
        # Layer 1 is not rotated, as in models that mix the two.
        "layer_rope": (0, None, 0, 0),
        "rope_neox": (True,),
    }
    return SpoolHeader(**(fields | changes))
