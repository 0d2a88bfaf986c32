"""ClusterKV: tokens in clusters of like keys; a query reads the clusters nearest to it."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvtc_vllm.evaluation.eviction.base import Attention
from kvtc_vllm.evaluation.recall.base import STORED_BYTES, Recall, RecalledLayer, cache_bytes
from kvtc_vllm.evaluation.settings import KEEP, Setting, Settings


class ClusterKV(Recall):
    """ClusterKV (arXiv 2412.03213), recall of clusters within a budget of 1/8 of the tokens.

    Followed: the first 16 tokens (setting `sinks`) are read by every query. The others' keys with
    RoPE are clustered by k-means with cosine distance, each KV head for itself, a cluster per 80
    tokens (setting `tokens`). A query head ranks clusters by the product of query and centroid
    and reads whole clusters, best first, the last one cut where the budget ends. Layers 0 and 1
    read everything (setting `whole`).
    Charged as stored: K and V of all tokens, centroids in 16 bits, and a cluster number per token
    and KV head. Charged as read: the centroids, the numbers, and K and V of the tokens that any
    query head of a KV head reads, as measured over the queries.
    The authors' code (github.com/sjtu-zhao-lab/ClusterKV, accuracy/) has the same: 16 sinks within
    the budget, 20 rounds, centroids that are means of keys and compared by cosine, a choice per
    query head, the last cluster cut; and 400 clusters, one per 80 tokens of 32K.
    Departures: rounds of k-means start from evenly spaced tokens, so that nothing is random.
    Every query after the prefix recalls, where the paper computes the prompt with all tokens;
    recent tokens are the replay's window. The paper's budgets are 1K to 2K of 32K tokens.
    """

    name: ClassVar[str] = "clusterkv"
    source: ClassVar[str] = "ClusterKV, arXiv 2412.03213: 1/8 of the tokens read, 80 per cluster"
    settings: ClassVar[Settings] = {
        "keep": KEEP,
        "tokens": Setting(80, 1, 4096, whole=True),
        "sinks": Setting(16, 0, 1024, whole=True),
        "whole": Setting(2, 0, 1024, whole=True),
    }

    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, attention: Attention
    ) -> RecalledLayer:
        size = cache_bytes(keys, values)
        heads, cached, width = keys.shape
        budget = self.budget(cached)
        sinks = min(int(self.values["sinks"]), budget)
        others = cached - sinks
        if layer < self.values["whole"] or not others:
            return RecalledLayer(keys, values, size, size)
        count = max(1, others // int(self.values["tokens"]))
        centroids, labels = cosine_clusters(keys[:, sinks:], count)
        bits = (count - 1).bit_length()
        index = heads * (count * width * STORED_BYTES + -(-others * bits // 8))
        choose = partial(_choose, centroids, labels, sinks, budget)
        return RecalledLayer(keys, values, size + index, index, choose)


def cosine_clusters(
    keys: torch.Tensor, count: int, rounds: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means with cosine distance: centroids [H, count, D], cluster of each token int64 [H, n].

    keys: [H, n, D], count at most n. A centroid is the mean of its keys; a cluster that loses all
    of them keeps its centroid. Of equals the first cluster takes a token.
    """
    tokens, width = keys.shape[1:]
    centroids = keys[:, torch.arange(count) * tokens // count]
    directions = F.normalize(keys, dim=-1)
    labels = None
    for _ in range(rounds):
        nearest = (directions @ F.normalize(centroids, dim=-1).mT).argmax(dim=-1)
        if labels is not None and torch.equal(nearest, labels):
            break
        labels = nearest
        sizes = F.one_hot(labels, count).sum(dim=1)[..., None]
        sums = torch.zeros_like(centroids).scatter_add_(
            1, labels[..., None].expand(-1, -1, width), keys
        )
        centroids = torch.where(sizes > 0, sums / sizes.clamp_min(1), centroids)
    assert labels is not None
    return centroids, labels


def _choose(
    centroids: torch.Tensor, labels: torch.Tensor, sinks: int, budget: int, queries: torch.Tensor
) -> torch.Tensor:
    """`Choose` for centroids [H, count, D] and labels [H, n] of the tokens after the sinks."""
    group = len(queries) // len(centroids)
    centroids = centroids.repeat_interleave(group, dim=0)
    labels = labels.repeat_interleave(group, dim=0)
    order = (queries @ centroids.mT).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)  # [Hq, T, count]
    of_token = rank.gather(2, labels[:, None].expand(-1, rank.shape[1], -1))
    # Within a cluster the oldest comes first, as sorting is stable.
    best = of_token.argsort(dim=-1, stable=True)[..., : budget - sinks] + sinks
    chosen = torch.zeros(*queries.shape[:2], sinks + labels.shape[1], dtype=torch.bool)
    chosen[..., :sinks] = True
    return chosen.scatter_(2, best, True)
