"""How a worker on a GPU starts: where its memory comes from, and what is done in advance."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton")
pytest.importorskip("vllm")

from kvtc_vllm.codec.artifact import at_ratio
from kvtc_vllm.codec.kernels import bit_payloads, step_payloads
from kvtc_vllm.config import load_config
from kvtc_vllm.connector import transfers
from kvtc_vllm.connector.sizing import MemoryPlan
from kvtc_vllm.connector.transfers import FoundArtifact, build_transfer, on_own_thread
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.codec.kernels.codecs import ALL, artifact_of
from tests.codec.kernels.fake_cuda import CUDA, FakeCuda
from tests.codec.synthetic import SyntheticModel
from tests.connector.fakes import BLOCK, geometry

SHAPE = geometry(head_size=32)
MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=2, head_size=32, head_size_v=32, layer_groups=((0, 1), (1, 2))
)
PLAN = MemoryPlan(staging=1 << 20, workspace=12345678, threads=3, reserved=0, free=None)


@pytest.fixture(scope="module")
def artifact() -> Any:
    return MODEL.artifact((4.0, 8.0), fit_rows=512)


def layout() -> PagedLayout:
    group = SHAPE.only_group
    caches = {name: torch.zeros(8, 2, BLOCK, 64).bfloat16() for name in group.layer_names}
    return PagedLayout(caches, group)


def test_nothing_of_ours_lies_in_a_pool_that_sleep_takes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's pools take what the calling thread allocates, and nvCOMP needs a stream of its own."""
    cuda = FakeCuda(monkeypatch)
    seen: list[tuple[int, str]] = []

    def build() -> str:
        seen.append((threading.get_ident(), cuda.current.name))
        cuda.launch("work")
        return "built"

    assert on_own_thread(CUDA, build) == "built"
    ((thread, stream),) = seen
    assert thread != threading.get_ident()
    assert stream != "default"
    # After what the engine did before, and done when the engine goes on.
    whats = [what for _, what in cuda.log]
    assert whats[0].startswith("record")
    assert whats[1:] == [whats[0].replace("record", "wait for"), "work", "synchronize"]


def test_a_failure_there_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def fail() -> None:
        cuda.launch("work")
        raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        on_own_thread(CUDA, fail)
    assert [what for _, what in cuda.log][-1] == "synchronize"
    assert on_own_thread(torch.device("cpu"), threading.get_ident) == threading.get_ident()


def test_memory_is_planned_when_the_bases_are_there(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    resident = bit_payloads.ResidentArtifact

    def noted(*args: Any) -> Any:
        events.append("bases")
        return resident(*args)

    def plan() -> MemoryPlan:
        events.append("plan")
        return PLAN

    monkeypatch.setattr(bit_payloads, "ResidentArtifact", noted)
    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    monkeypatch.setattr(transfers, "try_kernels", lambda *args: events.append("kernels"))
    config = load_config({"ratio": 8, "chunk_tokens": BLOCK, "self_test": False})
    found = FoundArtifact(artifact, None, Path())  # type: ignore[arg-type]
    served = build_transfer(found, config, layout(), SHAPE.only_group, plan)
    assert events == ["bases", "plan", "kernels"]
    assert served.codec.workspace_bytes == PLAN.workspace  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [pytest.param("kvtc", marks=ALL[1].marks), ALL[1]])
def test_kernels_are_tried_with_what_serving_has(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks of zeros are stored and loaded, by codec 2 as chunks with marked tokens."""
    launched: list[int] = []
    decode = step_payloads.decode_sections

    def decode_noted(*args: Any) -> None:
        (_, marked), _ = args[-2:]
        launched.append(marked)
        decode(*args)

    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    monkeypatch.setattr(step_payloads, "decode_sections", decode_noted)
    config = load_config({"codec": name, "ratio": 8, "chunk_tokens": BLOCK, "self_test": False})
    found = FoundArtifact(artifact_of(name, MODEL, (8.0,)), None, Path())  # type: ignore[arg-type]
    served = build_transfer(found, config, layout(), SHAPE.only_group, lambda: PLAN)
    assert type(served.transfer).__name__ == "KernelTransfer", caplog.text
    assert (max(launched, default=0) > 0) == (name == "kvtc2")


@pytest.mark.slow
def test_a_request_finds_its_tables(artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made under a lock, and the thread that makes them waits for its stream."""
    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    config = load_config({"ratio": 8, "chunk_tokens": BLOCK, "self_test": False})
    found = FoundArtifact(artifact, None, Path())  # type: ignore[arg-type]
    pages = layout()
    transfer = build_transfer(found, config, pages, SHAPE.only_group, lambda: PLAN).transfer
    monkeypatch.setattr(bit_payloads.PlanTables, "build", None)
    for starts in ([0], [BLOCK], [0, BLOCK, BLOCK]):
        stores = [StoreItem(b"", start, [1 + i]) for i, start in enumerate(starts)]
        blobs = transfer.encode(transfer.stage(stores))
        loads = [
            (LoadItem(b"", s.start, 0, s.block_ids), blob)
            for s, blob in zip(stores, blobs, strict=True)
        ]
        assert transfer.load(loads) == [None] * len(starts)  # type: ignore[arg-type]


def test_raw_goes_through_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "has_kernels", lambda device: True)
    config = load_config({"codec": "raw", "chunk_tokens": BLOCK})
    served = build_transfer(None, config, layout(), SHAPE.only_group, lambda: PLAN)
    assert type(served.transfer).__name__ == "KernelTransfer"
    assert served.resident == 0


def test_only_the_ratio_in_use_is_kept(artifact: Any) -> None:
    kept = at_ratio(artifact, 8.0)
    assert kept.ratios() == (8.0,)
    assert kept.fingerprint == artifact.fingerprint
    for key, section in kept.sections.items():
        whole = artifact.sections[key]
        assert section.basis.shape[1] == whole.plans[8.0].rank <= whole.basis.shape[1]
        assert torch.equal(section.basis, whole.basis[:, : section.basis.shape[1]])
