"""The replay trusts counters, not hopes: wrong ones end it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvtc_vllm.evaluation.replay.two_passes import ReplayError, replay
from kvtc_vllm.evaluation.scores import Scores, divergence
from kvtc_vllm.evaluation.tasks import Example, Session


class FakeEngine:
    """Counts like the connector would; `stolen` tokens are silently not reloaded."""

    def __init__(self, stolen: int = 0) -> None:
        self.loaded = 0
        self.seen: dict[str, int] = {}
        self.gpu: set[str] = set()
        self.stolen = stolen

    def reloadable(self, stored: int, prompt: int) -> int:
        return max(0, min(stored // 128 * 128, (prompt - 128) // 32 * 32))

    def run(self, requests):
        for request in requests:
            length = len(request.example.prompt)
            if request.salt in self.seen and request.salt not in self.gpu:
                self.loaded += self.reloadable(self.seen[request.salt], length) - self.stolen
            self.seen[request.salt] = length
            self.gpu.add(request.salt)
            request.result.touch()
        length = len(requests[0].example.target)
        nothing = np.zeros(length, np.float32)
        return [Scores(nothing, np.zeros(length, np.int64), nothing) for _ in requests]

    def drop_gpu_cache(self) -> None:
        self.gpu.clear()

    def counters(self) -> dict[str, float]:
        stored = float(sum(self.seen.values()))
        return {
            "loaded_tokens": self.loaded,
            "stored_raw_bytes": 16 * stored,
            "stored_bytes": stored,
        }


SINGLE = [Session([Example(list(range(500)), [1, 2], is_answer=True)]) for _ in range(3)]
CHAT = [
    Session([Example(list(range(n)), [1, 2], is_answer=True) for n in (400, 700, 900)])
    for _ in range(2)
]


@pytest.mark.parametrize("sessions", [SINGLE, CHAT])
def test_records_say_what_was_reloaded(tmp_path: Path, sessions: list[Session]) -> None:
    steps: list[int] = []
    records, stored = replay(FakeEngine(), "t", 512, sessions, tmp_path, steps.append)
    assert sum(steps) == 2 * sum(len(s.turns) for s in sessions)
    assert stored.raw == 16 * stored.stored > 0
    reloaded = [r.reloaded_tokens for r in records]
    assert reloaded == ([352] * 3 if sessions is SINGLE else [0, 0, 384, 384, 640, 640])


def test_a_prefix_that_did_not_come_from_the_tier_ends_the_replay(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="1053 tokens came from the tier, 1056 should have"):
        replay(FakeEngine(stolen=1), "t", 512, SINGLE, tmp_path, lambda _: None)


def test_divergence_is_exact_where_all_outcomes_are_listed() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, generator=generator).double().log_softmax(-1) for _ in range(2))
    expected = float((p.exp() * (p - q)).sum())
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(p, p) == 0.0
    best = p.topk(10).indices
    assert 0.0 < divergence(p[best], q[best]) <= expected
