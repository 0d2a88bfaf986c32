"""What recalls store and read, on tokens small enough to follow, and in a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtc_vllm.evaluation.eviction import Attention
from kvtc_vllm.evaluation.prefixes.recalled import Recalled
from kvtc_vllm.evaluation.prefixes.runner import PrefixRunner
from kvtc_vllm.evaluation.recall import RECALLS, RecalledLayer
from kvtc_vllm.evaluation.recall.clusterkv import cosine_clusters
from kvtc_vllm.evaluation.recall.tailorkv import outside_dominant, through_bits
from kvtc_vllm.evaluation.tasks.base import Example, Session
from tests.evaluation.eviction.brute_force import Masked

HEADS, SIZE = 2, 64
PREFIX, WINDOW = 64, 10


def store(name: str, tokens: int, focus: bool, layer: int = 5, **given: float) -> RecalledLayer:
    """A layer of noise. focus: whether queries look at one token or at all alike."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, tokens, SIZE, generator=generator) for _ in range(2))
    newest = torch.ones(HEADS, 4, tokens, dtype=torch.float64)
    if focus:
        newest[..., 3] = 1e6
    attention = Attention(newest.sum(1), newest[:, -1].float(), newest)
    return RECALLS[name](**given).store(layer, keys, values, attention)


def test_cosine_clusters_are_of_like_directions() -> None:
    """Two directions, of any length: the cluster of a token is that of its direction."""
    keys = torch.tensor([[[1.0, 0.1], [5, 0], [0, 3], [0.1, 1], [9, 0], [0, 7]]])
    centroids, labels = cosine_clusters(keys, 2)
    assert labels.tolist() in ([[0, 0, 1, 1, 0, 1]], [[1, 1, 0, 0, 1, 0]])
    first = labels[0, 0]
    torch.testing.assert_close(centroids[0, first], torch.tensor([5.0, 0.1 / 3]))


def test_clusterkv_reads_sinks_and_the_best_clusters_cut_at_the_budget() -> None:
    """Tokens 2 to 7 are two clusters of three; a query takes one and the oldest of the other."""
    keys = torch.zeros(1, 8, 2)
    keys[0, 2:8:2, 0], keys[0, 3:8:2, 1] = 1.0, 1.0
    attention = Attention(torch.ones(1, 8), torch.ones(2, 8), torch.ones(1, 1, 8))
    recall = RECALLS["clusterkv"](keep=6 / 8, sinks=2, tokens=3, whole=0)
    layer = recall.store(0, keys, keys, attention)
    assert layer.choose is not None
    queries = torch.tensor([[[1.0, 0.5]], [[0.5, 1.0]]])  # two query heads of one KV head
    first, second = (layer.choose(queries)[head, 0].nonzero()[:, 0].tolist() for head in (0, 1))
    assert first == [0, 1, 2, 3, 4, 6]
    assert second == [0, 1, 2, 3, 5, 7]
    # Two centroids of two elements, and a bit for each of six tokens.
    assert layer.index_bytes == 2 * 2 * 2 + 1
    assert layer.stored_bytes == 2 * 8 * 2 * 2 + layer.index_bytes


def test_clusterkv_leaves_the_first_layers_alone() -> None:
    layer = store("clusterkv", 128, focus=True, layer=1)
    assert layer.choose is None
    assert layer.index_bytes == layer.stored_bytes == 2 * HEADS * 128 * SIZE * 2


def test_tailorkv_tells_layers_apart_by_attention() -> None:
    newest = torch.full((1, 1, 100), 0.5 / 95, dtype=torch.float64)
    newest[..., :5] = 0.1
    assert outside_dominant(newest) == pytest.approx(0.5)
    assert store("tailorkv", 128, focus=True).choose is not None
    assert store("tailorkv", 128, focus=False).choose is None


def test_tailorkv_reads_sinks_and_the_best_products_of_few_channels() -> None:
    """Channel 1 is loudest, so with one channel the tokens with the most of it are read."""
    keys = torch.tensor([[[9.0, 0], [0, 1], [5, 0], [0, 8], [5, 2]]])
    newest = torch.tensor([[[1.0, 0, 0, 0, 0]]])
    recall = RECALLS["tailorkv"](keep=3 / 5, sinks=1, channels=1)
    layer = recall.store(0, keys, keys, Attention(newest[0], newest[0], newest))
    assert layer.choose is not None
    # The mean of both query heads is [0.5, 1]; 1 * 8 exceeds 0.5 * 9.
    chosen = layer.choose(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]))
    assert chosen[0, 0].nonzero()[:, 0].tolist() == [0, 3, 4]
    assert torch.equal(chosen[0], chosen[1])
    assert layer.index_bytes == 5 * 2
    assert layer.stored_bytes == 2 * 5 * 2 * 2


def test_tailorkv_charges_codes_parameters_and_the_tail() -> None:
    layer = store("tailorkv", 100, focus=False)
    keys = HEADS * (SIZE * 64 // 8 + SIZE * 4) + HEADS * SIZE * 36 * 2
    values = HEADS * 100 * (SIZE // 8 + 4)
    assert layer.stored_bytes == layer.index_bytes == keys + values


def test_one_bit_is_minimum_or_maximum() -> None:
    x = torch.tensor([[0.0, 1, 2, 8], [-1, -1, -1, -1]])
    back, size = through_bits(x, 1)
    assert back.tolist() == [[0, 0, 0, 8], [-1, -1, -1, -1]]
    assert size == 1 + 2 * 4
    fine, _ = through_bits(x, 8)
    assert (fine - x).abs().max() < 0.02


def test_quantised_layers_come_back_in_their_places() -> None:
    coarse, fine = (store("tailorkv", 100, focus=False, bits=bits) for bits in (1, 8))
    exact = store("tailorkv", 100, focus=True)
    for name in ("keys", "values"):
        ours, theirs = getattr(fine, name), getattr(exact, name)
        assert (ours - theirs).abs().max() < 0.05
        assert (getattr(coarse, name) - theirs).abs().max() > 0.5


@pytest.mark.parametrize("name", RECALLS)
def test_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: there is no setting 'colour'"):
        RECALLS[name](colour=1)


# Settings with which every query reads everything as it is.
EVERYTHING = {"clusterkv": {"keep": 1.0}, "tailorkv": {"keep": 1.0, "dense": 1.0}}


@pytest.mark.parametrize("name", RECALLS)
def test_reading_everything_is_the_exact_run(name: str, tiny: str, example: Example) -> None:
    recall = RECALLS[name](**EVERYTHING[name])
    replay = PrefixRunner(tiny, {"it": Recalled(recall)}).score(example, PREFIX, WINDOW)["it"]
    np.testing.assert_allclose(replay.reduced.nll, replay.exact.nll, atol=1e-4)
    assert replay.bytes_read >= replay.bytes_full


class TopOfKeys:
    """A recall for brute force: each query head reads tokens 0, and those with an even number."""

    def __init__(self) -> None:
        self.queries = 0

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor, _: Any) -> RecalledLayer:
        def choose(queries: torch.Tensor) -> torch.Tensor:
            self.queries += queries.shape[1]
            chosen = torch.zeros(*queries.shape[:2], keys.shape[1], dtype=torch.bool)
            chosen[0, :, ::2], chosen[1:, :, :8] = True, True
            return chosen

        return RecalledLayer(keys, values, 1000, 7, choose)


def test_recall_agrees_with_masking_and_is_counted(tiny: str, example: Example) -> None:
    """Query heads 0 and 1 share KV head 0, which reads the union."""
    recall: Any = TopOfKeys()
    replay = PrefixRunner(tiny, {"it": Recalled(recall)}).score(example, PREFIX, WINDOW)["it"]
    masked = Masked(tiny)
    ids = [*example.prompt, *example.target]
    visible = masked.causal(len(ids))
    for layer in visible:
        layer[0, PREFIX:, 1:PREFIX:2] = False
        layer[1:, PREFIX:, 8:PREFIX] = False
    log_probs, _ = masked.run(ids, visible)
    first = len(example.prompt) - 1
    wanted = [-float(log_probs[first + i, t]) for i, t in enumerate(example.target)]
    np.testing.assert_allclose(replay.reduced.nll, wanted, atol=1e-4)
    assert recall.queries == 2 * (len(ids) - 1 - PREFIX)
    assert replay.bytes_stored == 2 * 1000
    union = PREFIX // 2 + 4
    assert replay.bytes_read == 2 * (7 + (union + 8) * 2 * 16 * 2)


def test_turns_go_on_from_what_was_recalled(tiny: str, chat: Session) -> None:
    """The second turn's prefix is computed while queries read a part, so it differs."""
    part, whole = (
        PrefixRunner(tiny, {"it": Recalled(RECALLS["clusterkv"](whole=0, sinks=1, keep=keep))})
        for keep in (1 / 8, 1.0)
    )
    replays = [r.score_session(chat, WINDOW, chunk_tokens=8)["it"] for r in (part, whole)]
    assert [replay.prefix_tokens for replay in replays[0]] == [0, 40, 64]
    assert replays[0][0].bytes_stored == 0
    assert replays[0][2].reduced.kl.max() > 1e-2
    assert replays[1][2].reduced.kl.max() < 1e-6
    assert replays[0][2].bytes_read < replays[1][2].bytes_read
