"""Chunks of the reference model without running it: the artifact's own probe rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.artifact.registry import shipped_registry
from kvtc_vllm.codec.artifact import RankArtifact

TOKENS = 256
LAYERS, HEADS, SIZE = 8, 2, 64
MODEL = Path(__file__).parents[1] / "reference_model" / "model"
SETTINGS = {"model": str(MODEL), "ratio": 16}


@dataclass(frozen=True)
class Key:
    """LMCache's ObjectKey, for tests that run without LMCache."""

    chunk_hash: bytes
    model_name: str = str(MODEL)
    kv_rank: int = 0x01000100
    object_group_id: int = 0
    cache_salt: str = ""


@functools.cache
def probed() -> tuple[RankArtifact, Probe]:
    """The shipped artifact, K and V apart, and its probe."""
    (directory,) = (shipped_registry() / "kvtc-reference").glob("tp1-*")
    artifact, _, probe = load_rank_artifact(directory, 0)
    return artifact, probe


def kv(start: int, seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """K [T, L, H, D] post-RoPE and V [T, L, H, D], bfloat16."""
    artifact, probe = probed()
    index = torch.randint(len(probe.k), (tokens,), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(start, start + tokens)
    k = artifact.ropes[0].apply(probe.k[index].float(), positions)
    return k.to(torch.bfloat16), probe.v[index].to(torch.bfloat16)


def fused(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[1, L, T, H * (K | V)], as LMCache copies it from a GPU."""
    return torch.cat((k, v), dim=-1).transpose(0, 1).flatten(2)[None].contiguous()


def chunk(start: int, seed: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    """A fused chunk."""
    return fused(*kv(start, seed, tokens))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of `a` against `b`."""
    return float((a.float() - b.float()).norm() / b.float().norm())
