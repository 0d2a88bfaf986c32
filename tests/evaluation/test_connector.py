"""The bench's connector is ours with one key more, and hands its codec to the start-up."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.connector import connector as served
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.replay import connector as replayed
from kvtc_vllm.evaluation.replay.baseline_codec import BaselineCodec
from kvtc_vllm.evaluation.replay.connector import (
    CodecOverride,
    KVTCEvaluationConnector,
    override_codec,
)
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, codec_geometry

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


def test_a_float32_cache_stands_for_one_of_bfloat16() -> None:
    """The method gets, is charged for and gives back what it does in a bfloat16 cache; the engine
    gets its own element type, and exact chunks lose nothing."""
    group = replace(GROUP, dtype=torch.float32)
    kivi_alone = CodecOverride(baseline="kivi-2bit")
    wanted = CodecOverride(round_trips={"kivi-2bit": kivi_alone}, sixteen_bits=True)
    shared = override_codec(wanted, 0, group, (), (None, None))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(72, 2, 2, 64, generator=generator) for _ in range(2))
    blob = shared.encode(k, v, 0, b"name")
    try:
        TURN.begin(None)
        assert torch.equal(shared.decode(blob, 0, 72, b"name").k, k)
        TURN.begin("kivi-2bit")
        loaded = shared.decode(blob, 0, 72, b"name")
        counted = TURN.bytes()
    finally:
        TURN.begin(None)
    kivi = BaselineCodec(BASELINES["kivi-2bit"](codec_geometry(GROUP), torch.bfloat16))
    coded = kivi.encode(k.bfloat16(), v.bfloat16(), 0, b"name")
    alone = kivi.decode(coded, 0, 72, b"name")
    assert loaded.k.dtype == loaded.v.dtype == torch.float32
    assert torch.equal(loaded.k, alone.k.float())
    assert torch.equal(loaded.v, alone.v.float())
    assert counted == (2 * 72 * 2 * 2 * 64 * 2, len(coded))
