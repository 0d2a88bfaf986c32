"""Our threads beside the engine's: one core each, and no more of the CPU than their share."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from kvtc_vllm.offload.threads import Throttle, share_of_thread, thread_pool

CPU = torch.device("cpu")


def test_a_thread_of_ours_uses_one_core_and_leaves_the_engine_its_own() -> None:
    before = torch.get_num_threads()
    with thread_pool("test", 1, CPU) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


def test_work_is_paid_for_while_the_engine_computes() -> None:
    share = Throttle(0.25)
    share.engine_computes(True)
    began = time.monotonic()
    share.charge(0.05)
    assert time.monotonic() - began >= 0.15


def test_an_idle_engine_frees_who_waits_and_who_comes() -> None:
    share = Throttle(0.001)
    share.engine_computes(True)
    waiting = threading.Thread(target=share.charge, args=(10.0,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    share.engine_computes(False)
    waiting.join(20)
    assert not waiting.is_alive()
    share.charge(1e6)


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_a_whole_thread_never_waits(share: float) -> None:
    started = time.monotonic()
    Throttle(share).charge(1e9)
    assert time.monotonic() - started < 60


def test_the_share_is_of_the_machine() -> None:
    cores = os.cpu_count() or 1
    assert share_of_thread(0.1, CPU, threads=1, ranks=1) == pytest.approx(0.1 * cores)
    assert share_of_thread(0.1, CPU, threads=2, ranks=2) == pytest.approx(0.025 * cores)
    assert share_of_thread(0.1, torch.device("cuda"), threads=2, ranks=2) == 1.0
