"""Eviction as a mask over one pass without a cache: what `EvictionRunner` must agree with.

Shares no code with it. Positions are those of the text by construction, and nothing is
ever removed: queries after an eviction just can't see what was evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Choose = Callable[[torch.Tensor, list[list[int]], int], list[list[int]]]
"""attention [query heads, queries, keys], tokens alive of each KV head, budget -> tokens kept."""


def h2o(attention: torch.Tensor, alive: list[list[int]], budget: int) -> list[list[int]]:
    """Half newest, the rest by attention summed over queries and the KV head's query heads."""
    group = len(attention) // len(alive)
    kept = []
    for head, tokens in enumerate(alive):
        cut = len(tokens) - budget // 2
        score = [
            sum(float(attention[group * head + i, :, token].double().sum()) for i in range(group))
            for token in tokens[:cut]
        ]
        order = sorted(range(cut), key=lambda i, score=score: -score[i])
        kept.append(sorted([tokens[i] for i in order[: budget - budget // 2]] + tokens[cut:]))
    return kept


def tova(attention: torch.Tensor, alive: list[list[int]], budget: int) -> list[list[int]]:
    """Most attention from the last query, over all query heads."""
    score = [float(attention[:, -1, token].double().sum()) for token in alive[0]]
    order = sorted(range(len(score)), key=lambda i: -score[i])[:budget]
    return [sorted(alive[0][i] for i in order)] * len(alive)


def snapkv(attention: torch.Tensor, alive: list[list[int]], budget: int) -> list[list[int]]:
    """The newest tokens, and of each head's others those with the best mean of seven votes."""
    group = len(attention) // len(alive)
    recent = min(32, budget // 2)
    kept = []
    for head, tokens in enumerate(alive):
        older = tokens[: len(tokens) - recent]
        votes = [
            float(attention[group * head : group * (head + 1), -32:, token].double().sum())
            for token in older
        ]
        padded = [0.0] * 3 + votes + [0.0] * 3
        score = [sum(padded[i : i + 7]) for i in range(len(votes))]
        order = sorted(range(len(score)), key=lambda i, score=score: -score[i])
        chosen = [older[i] for i in order[: budget - recent]]
        kept.append(sorted(chosen + tokens[len(older) :]))
    return kept


def chunkkv(attention: torch.Tensor, alive: list[list[int]], budget: int) -> list[list[int]]:
    """The newest tokens, then whole runs of ten by their votes, then newest tokens again."""
    tokens = alive[0]
    recent = min(32, budget // 2)
    cut = len(tokens) - recent
    runs = [tokens[first : min(first + 10, cut)] for first in range(0, cut, 10)]
    score = [sum(float(attention[:, -32:, t].double().sum()) for t in run) for run in runs]
    kept = tokens[cut:]
    for i in sorted(range(len(runs)), key=lambda i: -score[i]):
        if len(kept) + len(runs[i]) <= budget:
            kept = kept + runs[i]
    for token in reversed(tokens):
        if len(kept) < budget and token not in kept:
            kept = [*kept, token]
    return [sorted(kept)] * len(alive)


def dbudgetkv(attention: torch.Tensor, alive: list[list[int]], budget: int) -> list[list[int]]:
    """The fewest newest tokens, and four oldest, that keep 99 % of the norm of the others."""
    tokens = alive[0]
    others = tokens[4:]

    def norm(kept: list[int]) -> float:
        return sum(float(head[-1, kept].double().norm()) for head in attention) / len(attention)

    count = next(n for n in range(1, len(others) + 1) if norm(others[-n:]) >= 0.99 * norm(others))
    return [tokens[:4] + others[-count:]] * len(alive)


CHOOSE: dict[str, Choose] = {
    "h2o": h2o,
    "tova": tova,
    "snapkv": snapkv,
    "chunkkv": chunkkv,
    "dbudgetkv": dbudgetkv,
}


class Masked:
    """A model whose layers and heads each see what they are told to."""

    def __init__(self, path: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.config = self._model.config

    @torch.inference_mode()
    def run(
        self, ids: list[int], visible: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-probs [n, vocabulary], attention of each layer [query heads, n, n].

        visible: of each layer, [query heads, n, n] bool.
        """
        handles = []
        for layer, seen in zip(self._model.model.layers, visible, strict=True):
            mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None]

            def see(module: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
                return args, {**kwargs, "attention_mask": mask}

            handles.append(layer.self_attn.register_forward_pre_hook(see, with_kwargs=True))
        output = self._model(torch.tensor([ids]), use_cache=False, output_attentions=True)
        for handle in handles:
            handle.remove()
        return output.logits[0].double().log_softmax(-1), [a[0] for a in output.attentions]

    def causal(self, n: int) -> list[torch.Tensor]:
        """Everything visible that came before."""
        heads = self.config.num_attention_heads
        triangle = torch.ones(n, n, dtype=torch.bool).tril()
        return [triangle.repeat(heads, 1, 1) for _ in range(self.config.num_hidden_layers)]

    def evicted(
        self, ids: list[int], prefixes: Sequence[int], share: float, choose: Choose
    ) -> tuple[torch.Tensor, list[list[list[int]]]]:
        """Log-probs after evicting at each prefix in turn, tokens alive of each layer and head."""
        visible = self.causal(len(ids))
        kv_heads = self.config.num_key_value_heads
        group = self.config.num_attention_heads // kv_heads
        alive: list[list[list[int]]] = [[[] for _ in range(kv_heads)] for _ in visible]
        before = 0
        for prefix in prefixes:
            _, attentions = self.run(ids, visible)
            for layer, attention in enumerate(attentions):
                here = [[*tokens, *range(before, prefix)] for tokens in alive[layer]]
                if prefix > before:
                    here = choose(attention[:, :prefix], here, int(prefix * share))
                alive[layer] = here
                for head, tokens in enumerate(here):
                    seen = visible[layer][group * head : group * (head + 1), prefix:]
                    seen[..., :prefix] = False
                    seen[..., tokens] = True
            before = prefix
        return self.run(ids, visible)[0], alive
