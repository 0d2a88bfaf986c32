"""What a baseline fits once per model, made through transformers from training text."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.calibration.documents import read_texts
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.cachegen import CacheGen
from kvtc_vllm.evaluation.baselines.cachegen_profile import CacheGenProfile
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.baselines.statistics import StatisticsTally
from kvtc_vllm.evaluation.data import corpus
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.settings import resolve
from kvtc_vllm.evaluation.tasks.base import encode_prompt

PROMPTS = 8
PROMPT_TOKENS = 1024
TEXT_PROMPTS = 16
"""Of text that is given: as many texts, each cut to `PROMPT_TOKENS`."""
_COUNTED = "kvtc-counted"
"""Name of attention that is watched, in transformers."""


def with_profile(method: Method, model: str, directory: Path) -> Method:
    """The method with what it fits once per model, as our basis is fitted; made if need be.

    directory: keeps it, so that methods that need the same share it; all of them have the same
    `texts`. Raises ValueError for a model of which it can't be made, DataError for text that
    can't be read.
    """
    name = method.override.get("baseline")
    make: Callable[[str, Path], None]
    if name == CacheGen.name:
        given = method.override.get("settings", {})
        bins = float(resolve(name, CacheGen.settings, given)["bins"])
        path = directory / f"profile-{bins:g}.safetensors"
        options = {"profile": str(path)}
        make = partial(cachegen_profile, bins=bins, texts=method.texts)
    elif name is not None and issubclass(BASELINES[name], FittedBaseline):
        path = directory / "statistics.safetensors"
        options = {"statistics": str(path)}
        make = partial(model_statistics, texts=method.texts)
    else:
        return method
    if not path.exists():
        make(model, path)
    return replace(method, override={**method.override, "options": options})


@torch.inference_mode()
def cachegen_profile(model: str, path: Path, bins: float = 1.0, texts: Sequence[str] = ()) -> None:
    """Symbol counts over `texts`, or prose and code that no task uses, saved to `path`.

    bins: factor of the widths. texts: as in `Method`.
    """
    tokenizer, network = _load(model)
    profile: CacheGenProfile | None = None
    for ids in _prompts(tokenizer, texts):
        layers = network(input_ids=torch.tensor([ids]), use_cache=True).past_key_values.layers
        # [1, H, T, D] per layer -> [T, L, H, D]
        k, v = (
            torch.stack([getattr(layer, name)[0] for layer in layers]).permute(2, 0, 1, 3)
            for name in ("keys", "values")
        )
        counted = CacheGenProfile.fit(k, v, bins)
        profile = counted if profile is None else profile + counted
    assert profile is not None
    profile.save(path)


@torch.inference_mode()
def model_statistics(model: str, path: Path, texts: Sequence[str] = ()) -> None:
    """`ModelStatistics` over the same text, saved to `path`.

    Raises ValueError for a model whose attention layers have no `k_proj` and `v_proj`, or that
    computes attention its own way.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokenizer, network = _load(model)
    attention = [m for m in network.modules() if hasattr(m, "k_proj") and hasattr(m, "layer_idx")]
    if not attention or any(not hasattr(m, "v_proj") for m in attention):
        raise ValueError(f"{model}: its attention layers have no k_proj and v_proj")
    tally = StatisticsTally(len(attention))
    plain: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def keep(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        plain[layer.kvtc_layer] = output

    def counted(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        layer = module.layer_idx
        heads, size = key.shape[1], key.shape[-1]
        keys = plain.pop(layer)[0].unflatten(-1, (heads, size)).movedim(1, 0)
        tally.add(layer, query[0], key[0], value[0], keys)
        seen.add(layer)
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    for module in attention:
        module.k_proj.kvtc_layer = module.layer_idx
        module.k_proj.register_forward_hook(keep)
    AttentionInterface.register(_COUNTED, counted)
    network.set_attn_implementation(_COUNTED)
    for ids in _prompts(tokenizer, texts):
        network(input_ids=torch.tensor([ids]), use_cache=False)
    if len(seen) != len(attention):
        raise ValueError(f"{model}: its attention can't be watched in transformers")
    weights = ([getattr(m, name).weight for m in attention] for name in ("k_proj", "v_proj"))
    tally.result(*weights).save(path)


def _load(model: str) -> tuple[Any, Any]:
    """Tokenizer and network in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network: Any = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,  # several times faster than bfloat16 on most CPUs
    )
    return AutoTokenizer.from_pretrained(model), network.eval()


def _prompts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if texts:
        return _given_prompts(tokenizer, texts)
    streams = (corpus.prose_documents("train"), corpus.code_documents("train"))
    prompts = []
    for documents in streams:
        # Eight characters per token are more than any tokeniser makes of text.
        text = "\n\n".join(documents)[: 8 * PROMPT_TOKENS * PROMPTS]
        ids = encode_prompt(tokenizer, text)
        half = PROMPTS // len(streams)
        prompts += [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(half)]
    return prompts


def _given_prompts(tokenizer: Any, sources: Sequence[str]) -> list[list[int]]:
    """Prompts of texts of all kinds, though a file may have one kind after the other."""
    texts = read_texts(sources, sys.maxsize)
    random.Random(0).shuffle(texts)
    prompts = []
    for text in texts[:TEXT_PROMPTS]:
        plain = (
            text
            if isinstance(text, str)
            else str(tokenizer.apply_chat_template(text, tokenize=False))
        )
        prompts.append(encode_prompt(tokenizer, plain[: 8 * PROMPT_TOKENS])[:PROMPT_TOKENS])
    return prompts
