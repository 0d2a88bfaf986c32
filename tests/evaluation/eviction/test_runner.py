"""Eviction runs against brute force, and what they are said to cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kvtc_vllm.evaluation.eviction import EVICTIONS, Attention, Eviction
from kvtc_vllm.evaluation.prefixes.evicted import Evicted
from kvtc_vllm.evaluation.prefixes.runner import PrefixRunner, Replay
from kvtc_vllm.evaluation.settings import Settings
from kvtc_vllm.evaluation.tasks.base import Example, Session
from tests.evaluation.eviction.brute_force import CHOOSE, Masked

PREFIX, WINDOW = 64, 10
LAYERS, KV_HEADS, HEAD_SIZE = 2, 2, 16
TOKEN_BYTES = LAYERS * KV_HEADS * HEAD_SIZE * 2 * 2

each_method = pytest.mark.parametrize("name", EVICTIONS)
# Settings with which all tokens stay.
EVERYTHING = {name: {"keep": 1.0} for name in EVICTIONS} | {"dbudgetkv": {"threshold": 0.0}}


def target_nll(log_probs: torch.Tensor, example: Example) -> np.ndarray:
    """log_probs: [prompt and target, vocabulary]."""
    first = len(example.prompt) - 1
    return np.array([-float(log_probs[first + i, t]) for i, t in enumerate(example.target)])


class Runner:
    """A `PrefixRunner` of one eviction."""

    def __init__(self, model: str, eviction: Eviction, **options: int) -> None:
        self._runner = PrefixRunner(model, {"it": Evicted(eviction)}, **options)

    def score(self, *arguments: Any) -> Replay:
        return self._runner.score(*arguments)["it"]

    def score_session(self, *arguments: Any, **options: int) -> list[Replay]:
        return self._runner.score_session(*arguments, **options)["it"]


class Recorded(Eviction):
    """Another eviction, with what it was given and what it chose."""

    name = "recorded"
    source = "a test"
    settings: ClassVar[Settings] = {}

    def __init__(self, inner: Eviction) -> None:
        super().__init__()
        self._inner = inner
        self.calls: list[tuple[Attention, torch.Tensor]] = []

    def budget(self, seen: int) -> int:
        return self._inner.budget(seen)

    def select(self, attention: Attention, budget: int) -> torch.Tensor:
        chosen = self._inner.select(attention, budget)
        self.calls.append((attention, chosen))
        return chosen


@each_method
def test_keeping_everything_is_the_uncompressed_run(name: str, tiny: str, example: Example) -> None:
    replay = Runner(tiny, EVICTIONS[name](**EVERYTHING[name])).score(example, PREFIX, WINDOW)
    masked = Masked(tiny)
    ids = [*example.prompt, *example.target]
    log_probs, _ = masked.run(ids, masked.causal(len(ids)))
    assert replay.reduced.kl is not None
    assert replay.reduced.kl.max() < 1e-6
    np.testing.assert_array_equal(replay.reduced.nll, replay.exact.nll)
    np.testing.assert_allclose(replay.exact.nll, target_nll(log_probs, example), atol=1e-4)
    expected_top = log_probs[len(example.prompt) - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(replay.exact.top, expected_top)


@each_method
@pytest.mark.parametrize("block_tokens", [7, 4096])
def test_eviction_agrees_with_masking(
    name: str, block_tokens: int, tiny: str, example: Example
) -> None:
    """Kept tokens, scores and, because its positions can't be wrong, positions."""
    recorded = Recorded(EVICTIONS[name]())
    runner = Runner(tiny, recorded, block_tokens=block_tokens)
    replay = runner.score(example, PREFIX, WINDOW)
    masked = Masked(tiny)
    ids = [*example.prompt, *example.target]
    log_probs, alive = masked.evicted(ids, [PREFIX], 1 / 8, CHOOSE[name])
    chosen = [slots.expand(KV_HEADS, -1).tolist() for _, slots in recorded.calls]
    assert chosen == alive
    np.testing.assert_allclose(replay.reduced.nll, target_nll(log_probs, example), atol=1e-4)
    full, _ = masked.run(ids, masked.causal(len(ids)))
    p, q = full[len(example.prompt) - 1 : -1], log_probs[len(example.prompt) - 1 : -1]
    divergences = (p.exp() * (p - q)).sum(-1)
    # Otherwise agreement would show nothing.
    assert divergences.min() > 1e-3
    assert replay.reduced.kl is not None
    np.testing.assert_allclose(replay.reduced.kl, divergences, atol=1e-4)


@each_method
def test_turns_agree_with_masking(name: str, tiny: str, chat: Session) -> None:
    """What was evicted stays so; H2O's sums go on, TOVA goes by the newest query."""
    recorded = Recorded(EVICTIONS[name]())
    replays = Runner(tiny, recorded).score_session(chat, WINDOW, chunk_tokens=8)
    masked = Masked(tiny)
    prefixes = [replay.prefix_tokens for replay in replays]
    assert prefixes == [0, 40, 64]
    for turn, (example, replay) in enumerate(zip(chat.turns, replays, strict=True)):
        ids = [*example.prompt, *example.target]
        log_probs, _ = masked.evicted(ids, prefixes[: turn + 1], 1 / 8, CHOOSE[name])
        full, _ = masked.run(ids, masked.causal(len(ids)))
        assert replay.example is example
        np.testing.assert_allclose(replay.exact.nll, target_nll(full, example), atol=1e-4)
        np.testing.assert_allclose(replay.reduced.nll, target_nll(log_probs, example), atol=1e-4)
    sizes = [(attention.last.shape[1], chosen.shape[1]) for attention, chosen in recorded.calls]
    if "keep" not in EVICTIONS[name].settings:
        return
    assert sizes == [(40, 5)] * LAYERS + [(5 + 24, 8)] * LAYERS


@each_method
def test_pieces_give_the_same_attention_as_one_pass(name: str, tiny: str, example: Example) -> None:
    pieces, whole = Recorded(EVICTIONS[name]()), Recorded(EVICTIONS[name]())
    Runner(tiny, pieces, block_tokens=7).score(example, PREFIX, WINDOW)
    Runner(tiny, whole, block_tokens=4096).score(example, PREFIX, WINDOW)
    for (ours, _), (theirs, _) in zip(pieces.calls, whole.calls, strict=True):
        torch.testing.assert_close(ours.received, theirs.received, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.last, theirs.last, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.newest, theirs.newest, atol=1e-5, rtol=0)
        # Every query gives 1 in all, from each of the 2 query heads of a KV head.
        torch.testing.assert_close(
            ours.received.sum(1), torch.full((KV_HEADS,), 2.0 * PREFIX).double(), atol=1e-3, rtol=0
        )


@each_method
def test_every_method_pays_for_what_it_chose(name: str, tiny: str, example: Example) -> None:
    """K and V of each head's tokens, and a bit per token for each set chosen by itself."""
    recorded = Recorded(EVICTIONS[name]())
    replay = Runner(tiny, recorded).score(example, PREFIX, WINDOW)
    chosen = [slots for _, slots in recorded.calls]
    assert len(chosen) == LAYERS
    kept = sum(slots.shape[1] for slots in chosen)
    assert 0 < kept < LAYERS * PREFIX
    masks = sum(map(len, chosen)) * PREFIX // 8
    assert replay.bytes_stored == kept * TOKEN_BYTES // LAYERS + masks


@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("h2o", LAYERS * KV_HEADS),
        ("tova", LAYERS),
        ("snapkv", LAYERS * KV_HEADS),
        ("chunkkv", LAYERS),
    ],
)
def test_bytes_are_what_is_kept_and_which(
    name: str, sets: int, tiny: str, example: Example, chat: Session
) -> None:
    runner = Runner(tiny, EVICTIONS[name]())
    replay = runner.score(example, 65, WINDOW)
    assert replay.bytes_full == 65 * TOKEN_BYTES
    assert replay.bytes_stored == 8 * TOKEN_BYTES + sets * 9
    first, second, third = runner.score_session(chat, WINDOW, chunk_tokens=8)
    assert (first.bytes_full, first.bytes_stored) == (0, 0)
    assert (second.bytes_full, second.bytes_stored) == (
        40 * TOKEN_BYTES,
        5 * TOKEN_BYTES + sets * 5,
    )
    assert (third.bytes_full, third.bytes_stored) == (64 * TOKEN_BYTES, 8 * TOKEN_BYTES + sets * 8)


def test_window_and_last_token_are_never_stored(tiny: str, example: Example) -> None:
    runner = Runner(tiny, EVICTIONS["h2o"]())
    assert runner.score(example, 103, WINDOW).prefix_tokens == 93
    assert runner.score(example, 103, 0).prefix_tokens == 102
    assert runner.score(example, 103, 500).prefix_tokens == 0
    assert runner.score_session(Session([example]), 20, 32)[0].prefix_tokens == 83
    assert runner.score_session(Session([example]), 0, 32)[0].prefix_tokens == 96


def test_nothing_stored_is_the_uncompressed_run(tiny: str, example: Example) -> None:
    replay = Runner(tiny, EVICTIONS["tova"]()).score(example, 0, WINDOW)
    np.testing.assert_array_equal(replay.reduced.nll, replay.exact.nll)


def test_turns_must_extend_each_other(tiny: str, chat: Session) -> None:
    first, second, third = chat.turns
    other = Example(third.prompt[::-1], third.target, is_answer=True)
    with pytest.raises(ValueError, match="does not extend"):
        Runner(tiny, EVICTIONS["h2o"]()).score_session(
            Session([first, second, other]), WINDOW, chunk_tokens=8
        )


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=32,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="full attention"):
        Runner(str(tmp_path), EVICTIONS["h2o"]())


def test_methods_of_one_runner_do_not_touch_each_other(tiny: str, chat: Session) -> None:
    """They share the first pass; each gives what it gives alone, in every turn."""
    evictions = {name: Evicted(EVICTIONS[name]()) for name in ("h2o", "chunkkv")}
    together = PrefixRunner(tiny, evictions).score_session(chat, WINDOW, chunk_tokens=8)
    for name in evictions:
        alone = Runner(tiny, EVICTIONS[name]()).score_session(chat, WINDOW, chunk_tokens=8)
        for ours, single in zip(together[name], alone, strict=True):
            np.testing.assert_array_equal(ours.reduced.nll, single.reduced.nll)
            assert ours.bytes_stored == single.bytes_stored
    last = [together[name][-1].reduced.nll for name in evictions]
    assert not np.array_equal(*last)
