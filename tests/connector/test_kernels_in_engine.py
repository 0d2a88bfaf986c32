"""The kernels in their place: inside a real vLLM, here in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton")

from kvtc_vllm.connector import transfers
from kvtc_vllm.connector.kernel_transfer import KernelTransfer
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from tests.connector.engine import drain, engine, greedy, metrics, texts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EXTRA = {"preset": "kvtc-8x", "chunk_tokens": 32, "recent_window": 1, "memory_bytes": 64 << 20}
FEW = {"num_gpu_blocks_override": 4, "max_num_seqs": 1, "max_model_len": 96}
"""No room for the blocks of two requests. One block is vLLM's own."""


def replies(model: Path, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, float], str]:
    """What is said to prompts that were stored before, the counters, and the way it went."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    with engine(model, EXTRA, **FEW) as llm:
        way = type(get_kv_transfer_group()._worker.transfers[0]).__name__
        for prompt in prompts:
            greedy(llm, [prompt], 8)
            drain(llm)
        found = [greedy(llm, [prompt], 8)[0] for prompt in prompts]
        return found, metrics(llm), way


@pytest.mark.long
def test_reloading_through_kernels_says_the_same(
    reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, other = texts(reference_model, count=2, tokens=65)
    # Of the long one the second chunk is loaded, of the other the first, which has the sinks.
    prompts = [long, other[:33]]
    # The reference, which kernels are bit-equal to; the fast way of a CPU rounds otherwise.
    monkeypatch.setattr(transfers, "open_codec", partial(transfers.open_codec, fast=False))
    by_torch, expected, way = replies(reference_model, prompts)
    assert way == TorchTransfer.__name__
    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    # What it does is tested in test_kernel_startup.py, and takes a third of the time here.
    monkeypatch.setattr(transfers, "try_kernels", lambda *args: None)
    by_kernels, values, way = replies(reference_model, prompts)
    assert way == KernelTransfer.__name__
    assert values["kvtc_loaded_tokens"] == values["kvtc_hit_tokens"] == expected["kvtc_hit_tokens"]
    assert values["kvtc_hit_tokens"] >= 2 * 32
    assert not any(count for name, count in values.items() if "failed" in name or "dropped" in name)
    assert values["kvtc_stored_bytes"] == pytest.approx(expected["kvtc_stored_bytes"], rel=0.01)
    assert by_kernels == by_torch


def test_kernels_that_fail_leave_the_work_to_torch(
    reference_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    monkeypatch.setattr(KernelTransfer, "stage", fail)
    _, values, way = replies(reference_model, texts(reference_model, count=2, tokens=65))
    assert way == TorchTransfer.__name__
    assert values["kvtc_loaded_tokens"] > 0
