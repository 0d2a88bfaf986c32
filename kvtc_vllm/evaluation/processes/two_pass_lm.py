"""lm-evaluation-harness's view of a replay engine: every request in two passes.

`lm_eval --model vllm` computes each prompt once and never reloads a block, so its
figures say nothing about a codec. Here lm-eval runs twice over one engine. The first
time, each request is computed exactly and stored, and then, the GPU cache dropped,
replayed with its prefix from the tier: lm-eval gets the exact answers. The second
time it asks the same and gets the answers of the replays. Several methods may share the
exact answers (`replay/round_trips.py`); then there is one more time for each.

Generation is always greedy, also for tasks that ask for sampling, for otherwise the
two would differ by chance. A context too long for the model loses its beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kvtc_vllm.evaluation.replay.engine import OpenRequest, ReplayEngine, Request
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.evaluation.replay.two_passes import BATCH, ReplayError, confirmed, grown
from kvtc_vllm.evaluation.reporting.results import EXACT
from kvtc_vllm.evaluation.tasks import Example

ROLLING_TOKENS = 128
"""Tokens of running text scored after each reload."""

Q = TypeVar("Q", Request, OpenRequest)
A = TypeVar("A")
T = TypeVar("T")


@dataclass
class Tally:
    """What the replays of one task did."""

    prompts: int = 0
    longest: int = 0
    """Tokens of the longest prompt."""
    prompt_tokens: int = 0
    reloaded_tokens: int = 0
    raw_bytes: int = 0
    """Of KV in the cache's dtype."""
    stored_bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.prompts + other.prompts,
            max(self.longest, other.longest),
            self.prompt_tokens + other.prompt_tokens,
            self.reloaded_tokens + other.reloaded_tokens,
            self.raw_bytes + other.raw_bytes,
            self.stored_bytes + other.stored_bytes,
        )

    def ratio(self) -> float:
        """Real compression ratio; 0 if nothing was stored."""
        return round(self.raw_bytes / self.stored_bytes, 3) if self.stored_bytes else 0.0


class TwoPassLM(TemplateLM):
    """lm-eval's view of a `ReplayEngine`.

    mode: whose answers lm-eval gets. First one evaluation in mode `EXACT`, which runs all
    passes; then the same with the name of each method as the mode, which only hands out what was
    kept. All methods raise ReplayError when the reloads that the tier's counters report are not
    as they must be. tallies: by method and task.
    """

    def __init__(self, engine: ReplayEngine, directory: Path, methods: Sequence[str]) -> None:
        """directory: for score files. methods: names; with several, the engine's round trips."""
        super().__init__()
        self.mode = EXACT
        self.tallies: dict[str, dict[str, Tally]] = {name: {} for name in methods}
        self._methods = list(methods)
        self.tokenizer = engine.tokenizer()
        self._engine = engine
        self._directory = directory
        self._task = ""
        self._kept: dict[str, tuple[list[Any], dict[str, list[Any]]]] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of a prompt with its continuation."""
        return self._engine.max_model_len

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the special tokens that the tokenizer itself adds."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation (nats), and whether greedy decoding gives it.

        The whole context is the prompt whose prefix is reloaded; the continuations of one
        context share what is stored for it.
        """
        tokenize_and_score = super().loglikelihood
        return self._by_task(requests, lambda part: tokenize_and_score(part, disable_tqdm=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each text (nats).

        A text is cut into windows of the model's length, as in lm-eval's other models, and
        a window into pieces of `ROLLING_TOKENS`. Each piece is scored after the window so
        far as its prompt, whose prefix is reloaded but for the recent window. So the first
        `ReplayEngine.shortest_reloadable` tokens of a window are scored without a reload.
        """
        return self._by_task(requests, self._score_texts)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuation of each context up to a stop string."""
        return self._by_task(requests, self._continue)

    def _by_task(
        self, requests: list[Instance], answer: Callable[[list[Instance]], list[T]]
    ) -> list[T]:
        """Answer the requests of one task after those of another, for separate tallies."""
        answers: dict[int, T] = {}
        numbers: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            numbers.setdefault(str(request.task_name), []).append(number)
        for self._task, own in numbers.items():
            part = answer([requests[number] for number in own])
            answers |= zip(own, part, strict=True)
        return [answers[number] for number in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], int] = {}
        scored: list[Request] = []
        for _, context, target in requests:
            prompt = context[-max(1, self.max_length - len(target)) :]
            group = contexts.setdefault(tuple(prompt), len(contexts))
            if target:
                scored.append(self._scored(f"choice {group}", prompt, target, len(scored)))
        answers = iter(self._score("loglikelihood", scored))
        return [next(answers) if target else (0.0, True) for _, _, target in requests]

    def _score_texts(self, requests: list[Instance]) -> list[float]:
        pieces: list[Request] = []
        owners: list[int] = []
        windows = 0
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(
                tokens, self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            ):
                context, target = make_disjoint_window(pair)
                for start in range(0, len(target), ROLLING_TOKENS):
                    prompt = context + target[:start]
                    piece = target[start : start + ROLLING_TOKENS]
                    pieces.append(self._scored(f"text {windows}", prompt, piece, len(pieces)))
                    owners.append(owner)
                windows += 1
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(
            owners, self._score("loglikelihood_rolling", pieces), strict=True
        ):
            totals[owner] += log_likelihood
        return totals

    def _continue(self, requests: list[Instance]) -> list[str]:
        prompts: list[OpenRequest] = []
        for request in requests:
            text, raw_options = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(raw_options))
            prompt, max_tokens = maybe_truncate(
                self.tok_encode(text),
                options["max_gen_toks"],
                self.max_length,
                shrink_gen_toks=True,
            )
            salt = f"{self._task}/generate {len(prompts)}"
            stop = tuple(text for text in options["until"] if text)
            prompts.append(OpenRequest(prompt, salt, stop, max_tokens))
        return self._answer("generate_until", prompts, self._engine.generate)

    def _scored(self, group: str, prompt: list[int], target: list[int], number: int) -> Request:
        example = Example(prompt, target, is_answer=True)
        result = self._directory / f"{number}.npz"
        return Request(example, f"{self._task}/{group}", result)

    def _score(self, request_type: str, requests: list[Request]) -> list[tuple[float, bool]]:
        def run(batch: Sequence[Request]) -> list[tuple[float, bool]]:
            return [
                (-float(scores.nll.sum()), scores.top.tolist() == request.example.target)
                for request, scores in zip(batch, self._engine.run(batch), strict=True)
            ]

        return self._answer(request_type, requests, run)

    def _answer(
        self, request_type: str, requests: list[Q], run: Callable[[Sequence[Q]], list[A]]
    ) -> list[A]:
        """Answers of the mode's pass. Requests with the same salt must share their prefixes."""
        name = f"{self._task}/{request_type}"
        if self.mode != EXACT:
            asked, kept = self._kept[name]
            if asked != requests:
                raise ReplayError(f"{name}: lm-eval asked something else the second time")
            return kept[self.mode]
        for tallies in self.tallies.values():
            tallies.setdefault(self._task, Tally())
        exact: dict[int, A] = {}
        replayed: dict[str, dict[int, A]] = {method: {} for method in self._methods}
        passes = 1 + len(self._methods)
        with tqdm(total=passes * len(requests), desc=name, unit="prompt", mininterval=2.0) as bar:
            for waves in _batches(requests):
                everything = sorted(itertools.chain.from_iterable(waves))
                before = self._engine.counters()
                with confirmed(self._engine, expected=0):
                    answers = run([requests[number] for number in everything])
                exact |= zip(everything, answers, strict=True)
                bar.update(len(everything))
                for method, own in replayed.items():
                    if len(self._methods) > 1:
                        TURN.begin(method)
                    for wave in waves:
                        self._engine.drop_gpu_cache()
                        part = [requests[number] for number in wave]
                        with confirmed(self._engine, expected=self._count(method, part)):
                            answers = run(part)
                        own |= zip(wave, answers, strict=True)
                        bar.update(len(wave))
                    self._count_bytes(method, before)
                self._engine.drop_gpu_cache()
        numbers = range(len(requests))
        kept = {method: [own[number] for number in numbers] for method, own in replayed.items()}
        self._kept[name] = requests, kept
        return [exact[number] for number in numbers]

    def _count(self, method: str, requests: Sequence[Request | OpenRequest]) -> int:
        """Note replays in the task's tally; returns the tokens that must be reloaded."""
        lengths = [len(request.prompt) for request in requests]
        reloads = sum(self._engine.reloadable(length, length) for length in lengths)
        found = Tally(len(lengths), max(lengths), sum(lengths), reloads)
        self.tallies[method][self._task] += found
        return reloads

    def _count_bytes(self, method: str, before: dict[str, float]) -> None:
        """Note what the batch since `before` took: what was stored, or what round trips made."""
        if len(self._methods) > 1:
            raw, stored = TURN.bytes()
        else:
            after = self._engine.counters()
            raw, stored = (
                int(grown(before, after, name)) for name in ("stored_raw_bytes", "stored_bytes")
            )
        self.tallies[method][self._task] += Tally(raw_bytes=raw, stored_bytes=stored)


def _batches(requests: Sequence[Request | OpenRequest]) -> Iterator[list[list[int]]]:
    """Numbers of the requests of `BATCH` salts at a time, in waves.

    Two requests of one wave never have the same salt: the second would find in the GPU
    cache what the first had reloaded, or not, depending on which of them is faster.
    """
    by_salt: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        by_salt.setdefault(request.salt, []).append(number)
    groups = list(by_salt.values())
    for first in range(0, len(groups), BATCH):
        rounds = itertools.zip_longest(*groups[first : first + BATCH])
        yield [[number for number in numbers if number is not None] for numbers in rounds]
