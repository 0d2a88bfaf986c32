"""Which tokens stay, on attention small enough to read."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.evaluation.eviction import EVICTIONS, Attention
from kvtc_vllm.evaluation.eviction.base import pooled

RECEIVED = torch.tensor([[9.0, 1, 5, 2, 3, 8], [1, 1, 2, 7, 1, 1]], dtype=torch.float64)
LAST = torch.tensor([[0.1, 0.5, 0.1, 0.1, 0.1, 0.1], [0.1, 0.0, 0.3, 0.3, 0.3, 0.0]])
NEWEST = torch.tensor([[[0.0, 0, 9, 0, 0, 1]], [[5, 0, 0, 0, 3, 0]]], dtype=torch.float64)


def select(name: str, budget: int) -> list[list[int]]:
    return EVICTIONS[name]().select(Attention(RECEIVED, LAST, NEWEST), budget).tolist()


def test_h2o_keeps_the_newest_and_the_heaviest_of_each_head() -> None:
    assert select("h2o", 4) == [[0, 2, 4, 5], [2, 3, 4, 5]]


def test_h2o_gives_the_odd_token_to_heavy_hitters() -> None:
    assert select("h2o", 1) == [[0], [3]]


def test_tova_keeps_what_the_last_query_looks_at_on_average() -> None:
    assert select("tova", 1) == [[1]]
    assert select("tova", 3) == [[1, 2, 3]]


def observed(votes: torch.Tensor) -> Attention:
    """Attention of which only the window's votes matter."""
    return Attention(votes, votes[:, :0], votes[:, None])


def test_snapkv_keeps_the_window_and_clusters_of_each_head() -> None:
    """40 tokens, budget 10: five newest, and five around the token with all votes."""
    votes = torch.zeros(2, 40, dtype=torch.float64)
    votes[0, 20], votes[1, 3] = 1.0, 1.0
    chosen = EVICTIONS["snapkv"]().select(observed(votes), 10).tolist()
    newest = list(range(35, 40))
    # Seven tokens have equal means; the oldest five of them stay.
    assert chosen == [[*range(17, 22), *newest], [*range(5), *newest]]


def test_snapkv_pools_by_the_largest_vote_if_asked() -> None:
    """One vote of 4 against five of 1 in a row: the average over five prefers the row."""
    votes = torch.zeros(1, 40, dtype=torch.float64)
    votes[0, 8], votes[0, 20:25] = 4.0, 1.0
    newest = list(range(35, 40))

    def kept(**settings: float) -> list[int]:
        eviction = EVICTIONS["snapkv"](pooling=5, **settings)
        (chosen,) = eviction.select(observed(votes), 10).tolist()
        return chosen

    assert kept(max=1) == [*range(6, 11), *newest]
    # Means: .8 around token 8; 1 at token 22, .8 at its neighbours, of which older ones stay.
    assert kept() == [6, 7, 8, 9, 22, *newest]


def test_chunkkv_keeps_whole_runs_of_a_layer() -> None:
    """62 tokens, budget 24: twelve newest stay, one run of ten fits, two newest more."""
    votes = torch.zeros(2, 62, dtype=torch.float64)
    votes[0, 23], votes[1, 27], votes[0, 41] = 1.0, 1.0, 1.5
    (chosen,) = EVICTIONS["chunkkv"]().select(observed(votes), 24).tolist()
    assert chosen == [*range(20, 30), *range(48, 62)]


def test_dbudgetkv_stops_where_the_norm_would_change() -> None:
    """Of 3, 4, 0, 12 after two sinks, norms of the rest are 13, sqrt(160), 12, 12."""
    last = torch.tensor([[5.0, 5, 3, 4, 0, 12]])
    attention = Attention(last.double(), last, last[None].double())

    def kept(threshold: float) -> list[int]:
        eviction = EVICTIONS["dbudgetkv"](threshold=threshold, sinks=2)
        (chosen,) = eviction.select(attention, 6).tolist()
        return chosen

    assert kept(0.02) == [0, 1, 2, 3, 4, 5]
    assert kept(1 - 12.649 / 13 + 0.001) == [0, 1, 3, 4, 5]
    assert kept(0.08) == [0, 1, 5]
    assert kept(0.9) == [0, 1, 5]


def test_dbudgetkv_averages_norms_over_query_heads() -> None:
    """One head looks at the oldest, the other at the newest: half of the norm would be lost."""
    last = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    attention = Attention(last.double(), last, last[:, None].double())
    chosen = [
        EVICTIONS["dbudgetkv"](threshold=t, sinks=0).select(attention, 3).tolist()
        for t in (0.49, 0.51)
    ]
    assert chosen == [[[0, 1, 2]], [[2]]]


def test_pooled_attention_is_of_all_layers_and_heads() -> None:
    one = Attention(RECEIVED, LAST, NEWEST)
    both = pooled([one, one])
    assert both.received.tolist() == [[20.0, 4, 14, 18, 8, 18]]
    assert both.observed(1).tolist() == [[10.0, 0, 18, 0, 6, 2]]
    assert EVICTIONS["h2o"]().select(both, 4).tolist() == [[0, 3, 4, 5]]
    assert EVICTIONS["tova"]().select(both, 1).tolist() == [[1]]


@pytest.mark.parametrize("name", [n for n in EVICTIONS if "keep" in EVICTIONS[n].settings])
def test_whole_budget_keeps_everything_in_order(name: str) -> None:
    assert all(row == list(range(6)) for row in select(name, 6))


@pytest.mark.parametrize("name", EVICTIONS)
def test_budget_is_the_share_of_the_tokens_seen(name: str) -> None:
    eviction = EVICTIONS[name]()
    budgets = [eviction.budget(seen) for seen in (1, 15, 16, 1024)]
    assert budgets == ([1, 1, 2, 128] if "keep" in eviction.settings else [1, 15, 16, 1024])


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"h2o: keep={share:g} is not a number from"):
        EVICTIONS["h2o"](keep=share)
