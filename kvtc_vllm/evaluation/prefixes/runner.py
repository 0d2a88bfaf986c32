"""Scores of examples whose stored prefix has lost tokens, or is read in part, in transformers.

vLLM's paged cache can't hold other tokens for each head, so this does what the replay
through the tier does, outside vLLM: the prefix is computed and stored before the rest
of the prompt is seen (a stored prefix doesn't know its question); the rest and the
target then run over what is left, at their true positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvtc_vllm.evaluation.eviction.tally import AttentionTally
from kvtc_vllm.evaluation.meter import Meter
from kvtc_vllm.evaluation.prefixes.base import Left, Prefix, PrefixMethod
from kvtc_vllm.evaluation.recall import attention
from kvtc_vllm.evaluation.recall.base import cache_bytes
from kvtc_vllm.evaluation.scores import REFERENCE_TOKENS, Scores, divergence
from kvtc_vllm.evaluation.tasks.base import Example, Session

BLOCK_TOKENS = 256
"""Queries run at once; bounds the attention maps to [heads, 256, context]."""


class Replay(NamedTuple):
    """One example exactly, and with what a method does to its first `prefix_tokens` tokens.

    bytes_full, bytes_stored: of that prefix. bytes_read: what one query after it reads of it.
    """

    example: Example
    prefix_tokens: int
    exact: Scores
    reduced: Scores
    bytes_full: int
    bytes_stored: int
    bytes_read: int


class PrefixRunner:
    """Owns a model. Computes in `dtype`, on the CPU. methods: by name.

    float32 by default: sums of attention are then free of bfloat16's rounding, and
    both runs have the checkpoint's bfloat16 weights without loss.

    meter: what exact runs and each method take; may be replaced between sessions.
    """

    def __init__(
        self,
        model: str,
        methods: Mapping[str, PrefixMethod],
        *,
        dtype: torch.dtype = torch.float32,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        attention.install()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation=attention.IMPLEMENTATION
        ).eval()
        layers = DynamicCache(config=self._model.config).layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            raise ValueError(f"{model}: this needs full attention in every layer")
        self._methods = methods
        self.meter = Meter()
        self._block_tokens = block_tokens

    def score(self, example: Example, prefix_tokens: int, window: int) -> dict[str, Replay]:
        """By method, one example of which the first `prefix_tokens` tokens are stored.

        window: tokens before the end of the prompt that are never stored, so that less
        may be.
        """
        replays = self._replay([example], [_within(example, prefix_tokens, window)])
        return {name: own[0] for name, own in replays.items()}

    def score_session(
        self, session: Session, window: int, chunk_tokens: int
    ) -> dict[str, list[Replay]]:
        """By method, every turn, with the prefix stored that `replay.py` has the tier give back.

        That is the whole chunks of the prompt itself, or in a chat of the prompt before,
        up to the window. What was stored stays as it is: the tokens by which the prefix
        grows are computed over what earlier turns left, join it, and together they are
        stored anew, to the budget of all tokens seen.
        """
        turns = session.turns
        earlier = [0, *(len(turn.prompt) for turn in turns[:-1])]
        run = earlier if len(turns) > 1 else [len(turns[0].prompt)]
        prefixes = [
            _within(turn, tokens - tokens % chunk_tokens, window)
            for turn, tokens in zip(turns, run, strict=True)
        ]
        return self._replay(turns, prefixes)

    @torch.inference_mode()
    def _replay(self, turns: Sequence[Example], prefixes: Sequence[int]) -> dict[str, list[Replay]]:
        """prefixes: tokens stored of each turn. ValueError if they don't extend each other."""
        exact: Any = DynamicCache()
        states: dict[str, tuple[Prefix, Left]] = {}
        stored: list[int] = []
        replays: dict[str, list[Replay]] = {name: [] for name in self._methods}
        for example, prefix_tokens in zip(turns, prefixes, strict=True):
            prefix = example.prompt[:prefix_tokens]
            new = prefix[len(stored) :]
            if prefix != [*stored, *new]:
                raise ValueError("a turn's stored prefix does not extend that of the turn before")
            if new:
                states = self._grow(exact, states, new, start=len(stored))
            stored = prefix
            with self.meter.on():
                reference = self._target_logits(exact, example, len(stored), None)
            full = _bytes(exact)
            for name, own in replays.items():
                found = states.get(name)
                cache, left = (found[0].cache, found[1]) if found else (exact, Left(0))
                reads = attention.Reads(left.recalled) if left.recalled else None
                with self.meter.on(name):
                    logits = self._target_logits(cache, example, len(stored), reads)
                own.append(
                    Replay(
                        example=example,
                        prefix_tokens=len(stored),
                        exact=_scores(reference, example.target),
                        reduced=_scores(logits, example.target, reference),
                        bytes_full=full,
                        bytes_stored=left.stored_bytes,
                        bytes_read=reads.bytes_per_query() if reads else left.stored_bytes,
                    )
                )
        return replays

    def _grow(
        self, exact: Any, states: dict[str, tuple[Prefix, Left]], new: list[int], start: int
    ) -> dict[str, tuple[Prefix, Left]]:
        """Each method's prefix with new tokens, stored anew; `exact` gets them too.

        The first tokens are the same for all methods, so they are computed once.
        """
        first = AttentionTally(self._model.config.num_key_value_heads)
        with self.meter.on(), first.watching(self._model):
            self._run(exact, new, start)
        grown: dict[str, tuple[Prefix, Left]] = {}
        for name, method in self._methods.items():
            with self.meter.on(name):
                if name in states:
                    prefix = self._grown(*states[name], new, start)
                else:
                    prefix = Prefix(
                        _copy(exact), first.copy(), start + len(new), _places(new, start)
                    )
                grown[name] = (prefix, method.store(prefix))
        return grown

    def _grown(self, prefix: Prefix, left: Left, new: list[int], start: int) -> Prefix:
        """The prefix with new tokens, computed over what the method left of it."""
        reads = attention.Reads(left.recalled) if left.recalled else None
        with prefix.tally.watching(self._model), attention.recalling(self._model, reads):
            self._run(prefix.cache, new, start)
        prefix.seen = start + len(new)
        prefix.positions = torch.cat((prefix.positions, _places(new, start)))
        return prefix

    def _run(self, cache: Any, ids: list[int], start: int, rows: int = 1) -> torch.Tensor:
        """Append tokens to a DynamicCache; logits of the last `rows` of each block, 0 for all.

        start: position of the first of them in the text. It isn't the cache's length
        once tokens were evicted; the mask goes by the order in the cache, which is right
        for both.
        """
        logits = []
        for first in range(0, len(ids), self._block_tokens):
            block = torch.tensor([ids[first : first + self._block_tokens]])
            positions = start + first + torch.arange(block.shape[1])
            output = self._model(
                input_ids=block,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=rows,
            )
            logits.append(output.logits[0])
        return torch.cat(logits)

    def _target_logits(
        self, cache: Any, example: Example, start: int, reads: attention.Reads | None
    ) -> torch.Tensor:
        """[target, vocabulary], computed from position `start` on. Leaves the cache as it was."""
        *rest, last = example.prompt[start:]
        ids = [last, *example.target[:-1]]
        with attention.recalling(self._model, reads):
            if rest:
                self._run(cache, rest, start)
            logits = self._run(cache, ids, start + len(rest), rows=0)
        cache.crop(-(len(rest) + len(ids)))
        return logits


def _within(example: Example, tokens: int, window: int) -> int:
    """Tokens that may be stored. At least one is always computed: its output begins the target."""
    return max(0, min(tokens, len(example.prompt) - max(1, window)))


def _places(new: list[int], start: int) -> torch.Tensor:
    """Positions of new tokens in the text."""
    return torch.arange(start, start + len(new))


def _copy(cache: Any) -> Any:
    """Another cache of the same tensors, none of which is changed in place."""
    other: Any = DynamicCache()
    for number, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, number)
    return other


def _bytes(cache: Any) -> int:
    """K and V as they would be stored."""
    return sum(cache_bytes(layer.keys, layer.values) for layer in cache.layers)


def _scores(
    logits: torch.Tensor, target: list[int], reference: torch.Tensor | None = None
) -> Scores:
    """logits, reference: [target, vocabulary] of this run and of the exact one.

    The divergence is over as many tokens as for the methods that run in vLLM.
    """
    wanted = torch.tensor(target)[:, None]
    log_probs = logits.double().log_softmax(-1)
    kl = None
    if reference is not None:
        best = reference.double().log_softmax(-1).topk(min(REFERENCE_TOKENS, logits.shape[-1]))
        ours = log_probs.gather(1, best.indices)
        kl = np.array([divergence(*rows) for rows in zip(best.values, ours, strict=True)])
    return Scores(
        nll=-log_probs.gather(1, wanted)[:, 0].float().numpy(),
        top=log_probs.argmax(-1).numpy(),
        kl=None if kl is None else kl.astype(np.float32),
    )
