"""The bench's connector is ours with one key more, and hands its codec to the start-up."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.connector import connector as served
from kvtc_vllm.evaluation.replay import connector as replayed
from kvtc_vllm.evaluation.replay.connector import KVTCEvaluationConnector
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup

GROUP = CacheGroup(("layers.0", "layers.1"), 32, 2, 64, 64, torch.bfloat16)
GEOMETRY = CacheGeometry((GROUP,), 1)


def start(monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What a worker's connector gives to `build_worker`, by name."""
    worker: dict[str, Any] = {}
    monkeypatch.setattr(served, "read_geometry", lambda *_: GEOMETRY)
    signature = inspect.signature(served.build_worker)
    monkeypatch.setattr(
        served, "build_worker", lambda *given: worker.update(signature.bind(*given).arguments)
    )
    extra = {"codec": "raw", "chunk_tokens": 64, "evaluation": evaluation}
    engine: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        model_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
    )
    cache: Any = SimpleNamespace(kv_cache_groups=[])
    KVTCEvaluationConnector(engine, KVConnectorRole.WORKER, cache).register_kv_caches({})
    assert extra["evaluation"] == evaluation
    return worker


def test_a_baseline_takes_the_codec_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    given = start(monkeypatch, {"baseline": "fp8-e4m3"})
    config = given["lookup"].config
    assert (config.codec, config.chunk_tokens) == ("raw", 64)
    coder = given["codec_factory"](0, given["geometry"].only_group, (), (None, None))
    k, v = torch.randn(2, 64, 2, 2, 64).bfloat16()
    decoded = coder.decode(coder.encode(k, v, 128, b"key"), 128, 64, b"key")
    assert torch.allclose(decoded.k.float(), k.float(), rtol=0.1, atol=0.1)
    assert torch.allclose(decoded.v.float(), v.float(), rtol=0.1, atol=0.1)


def test_nothing_asked_for_leaves_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, {})["codec_factory"] is None


def test_every_cache_group_has_its_own_part_of_an_artifact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Path] = []

    def no_file(path: Path, *_: int) -> Any:
        read.append(path)
        raise ArtifactError("not read here")

    monkeypatch.setattr(replayed, "read_rank_file", no_file)
    trip = {
        "variant": "unchanged",
        "artifact": str(tmp_path / "rank0of1.safetensors"),
        "ratio": 8.0,
    }
    factory = start(monkeypatch, {"round_trips": {"kvtc-8x": trip}})["codec_factory"]
    for number in range(2):
        with pytest.raises(ArtifactError):
            factory(number, GROUP, (), (None, None))
    assert read == [tmp_path / "rank0of1.safetensors", tmp_path / "group1" / "rank0of1.safetensors"]
