"""What a baseline fits once per model, made through transformers from training text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.evaluation.baselines.cachegen import CacheGen
from kvtc_vllm.evaluation.baselines.cachegen_profile import CacheGenProfile
from kvtc_vllm.evaluation.data import corpus
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.tasks.base import encode_prompt

PROMPTS = 8
PROMPT_TOKENS = 1024


def with_profile(method: Method, model: str, directory: Path) -> Method:
    """CacheGen's distributions are profiled once per model, as our basis is fitted."""
    if method.override.get("baseline") != CacheGen.name:
        return method
    path = cachegen_profile(model, directory / "profile.safetensors")
    return replace(method, override={**method.override, "options": {"profile": str(path)}})


@torch.inference_mode()
def cachegen_profile(model: str, path: Path) -> Path:
    """Symbol counts over prose and code that no task uses, saved to `path`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,  # several times faster than bfloat16 on most CPUs
    ).eval()
    profile: CacheGenProfile | None = None
    for ids in _prompts(tokenizer):
        layers = network(input_ids=torch.tensor([ids]), use_cache=True).past_key_values.layers
        # [1, H, T, D] per layer -> [T, L, H, D]
        k, v = (
            torch.stack([getattr(layer, name)[0] for layer in layers]).permute(2, 0, 1, 3)
            for name in ("keys", "values")
        )
        counted = CacheGenProfile.fit(k, v)
        profile = counted if profile is None else profile + counted
    assert profile is not None
    profile.save(path)
    return path


def _prompts(tokenizer: Any) -> list[list[int]]:
    streams = (corpus.prose_documents("train"), corpus.code_documents("train"))
    prompts = []
    for documents in streams:
        # Eight characters per token are more than any tokeniser makes of text.
        text = "\n\n".join(documents)[: 8 * PROMPT_TOKENS * PROMPTS]
        ids = encode_prompt(tokenizer, text)
        half = PROMPTS // len(streams)
        prompts += [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(half)]
    return prompts
