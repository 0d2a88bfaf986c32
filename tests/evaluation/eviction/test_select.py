"""Which tokens stay, on attention small enough to read."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.evaluation.eviction import EVICTIONS, Attention

RECEIVED = torch.tensor([[9.0, 1, 5, 2, 3, 8], [1, 1, 2, 7, 1, 1]], dtype=torch.float64)
LAST = torch.tensor([[0.1, 0.5, 0.1, 0.1, 0.1, 0.1], [0.1, 0.0, 0.3, 0.3, 0.3, 0.0]])
OBSERVED = torch.tensor([[0.0, 0, 9, 0, 0, 1], [5, 0, 0, 0, 3, 0]], dtype=torch.float64)


def select(name: str, budget: int) -> list[list[int]]:
    return EVICTIONS[name]().select(Attention(RECEIVED, LAST, OBSERVED), budget).tolist()


def test_h2o_keeps_the_newest_and_the_heaviest_of_each_head() -> None:
    assert select("h2o", 4) == [[0, 2, 4, 5], [2, 3, 4, 5]]


def test_h2o_gives_the_odd_token_to_heavy_hitters() -> None:
    assert select("h2o", 1) == [[0], [3]]


def test_tova_keeps_what_the_last_query_looks_at_on_average() -> None:
    assert select("tova", 1) == [[1]]
    assert select("tova", 3) == [[1, 2, 3]]


def observed(votes: torch.Tensor) -> Attention:
    """Attention of which only the window's votes matter."""
    return Attention(votes, votes[:, :0], votes)


def test_snapkv_keeps_the_window_and_clusters_of_each_head() -> None:
    """40 tokens, budget 10: five newest, and five around the token with all votes."""
    votes = torch.zeros(2, 40, dtype=torch.float64)
    votes[0, 20], votes[1, 3] = 1.0, 1.0
    chosen = EVICTIONS["snapkv"]().select(observed(votes), 10).tolist()
    newest = list(range(35, 40))
    # Seven tokens have equal means; the oldest five of them stay.
    assert chosen == [[*range(17, 22), *newest], [*range(5), *newest]]


def test_chunkkv_keeps_whole_runs_of_a_layer() -> None:
    """62 tokens, budget 24: twelve newest stay, one run of ten fits, two newest more."""
    votes = torch.zeros(2, 62, dtype=torch.float64)
    votes[0, 23], votes[1, 27], votes[0, 41] = 1.0, 1.0, 1.5
    (chosen,) = EVICTIONS["chunkkv"]().select(observed(votes), 24).tolist()
    assert chosen == [*range(20, 30), *range(48, 62)]


@pytest.mark.parametrize("name", EVICTIONS)
def test_whole_budget_keeps_everything_in_order(name: str) -> None:
    assert all(row == list(range(6)) for row in select(name, 6))


@pytest.mark.parametrize("name", EVICTIONS)
def test_budget_is_the_share_of_the_tokens_seen(name: str) -> None:
    eviction = EVICTIONS[name]()
    assert [eviction.budget(seen) for seen in (1, 15, 16, 1024)] == [1, 1, 2, 128]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share_kept"):
        EVICTIONS["h2o"](share)
