"""The room that is reserved for a chunk: never less than its blob takes, whatever the artifact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("vllm")

from kvtc_vllm.artifact.card import ArtifactCard, CurveCard, CurvePoint, DataCard, save_card
from kvtc_vllm.codec.artifact import KINDS, RankArtifact, SectionBasis
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector import artifact_lookup
from kvtc_vllm.connector.artifact_lookup import Lookup
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, codec_geometry

RATIO = 16.0
SHAPE = CacheGroup(
    layer_names=tuple(f"layers.{i}" for i in range(8)),
    block_size=32,
    num_kv_heads=4,
    head_size=64,
    head_size_v=64,
    dtype=torch.bfloat16,
)
CACHE = CacheGeometry((SHAPE,), 2)
GEOMETRY = codec_geometry(SHAPE, ((0, 3), (3, 8)))


def artifact(sink_tokens: int) -> RankArtifact:
    """Plans use all of their budgets."""
    sections = {}
    for group in range(len(GEOMETRY.layer_groups)):
        for kind in KINDS:
            p = GEOMETRY.row_size(group, kind)
            groups = tuple(CoefficientGroup(16 * i, 16, "int4") for i in range(p // 96))
            plan = BitPlan(RATIO, groups, 0.5)
            sections[group, kind] = SectionBasis(
                torch.zeros(p), torch.eye(p)[:, : p // 6].half(), {RATIO: plan}
            )
    return RankArtifact(GEOMETRY, sections, (), (None,) * 8, bytes(16), sink_tokens)


def card(sink_tokens: int) -> ArtifactCard:
    return ArtifactCard(
        model_name="m",
        identity="i",
        config_fingerprint="c",
        weights_fingerprint="w",
        tp_size=2,
        fingerprints=("a", "b"),
        rope_fingerprints=(),
        kv_dtype="bfloat16",
        geometry=GEOMETRY,
        sink_tokens=sink_tokens,
        data=DataCard(files=(), tokens=1, train_tokens=1, heldout_tokens=1, seed=0),
        ratios=(RATIO,),
        sections=(),
        size_bytes={},
        checksums={},
        created="",
        versions={},
        method="",
        seconds=0.0,
    )


def noise(tokens: int, seed: int) -> torch.Tensor:
    """bfloat16 of random bits but the highest of the exponent, hence finite: they hardly shrink."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, 8, 4, 64)
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    return (bits & ~0x4000).view(torch.bfloat16)


@pytest.mark.parametrize("tokens", [32, 128])
@pytest.mark.parametrize("sink_tokens", [0, 4, 8, 32, 255])
def test_no_blob_exceeds_what_the_card_says(tmp_path: Path, sink_tokens: int, tokens: int) -> None:
    save_card(tmp_path, card(sink_tokens))
    lookup = Lookup(load_config({"codec": "kvtc", "chunk_tokens": tokens}), tmp_path, "")
    (bound,) = artifact_lookup.record_bounds(SimpleNamespace(), lookup, CACHE)
    codec = open_codec("kvtc", SHAPE.dtype, artifact=artifact(sink_tokens), ratio=RATIO)
    longest = max(
        len(codec.encode(noise(tokens, 1), noise(tokens, 2), start)) for start in (0, tokens)
    )
    assert longest <= codec.max_blob_bytes(tokens) <= bound
    # Nor is much more reserved than the plans may take.
    assert bound < 1.05 * codec.max_blob_bytes(tokens) + 0.1 * tokens * SHAPE.token_bytes / RATIO


def test_raw_needs_no_artifact() -> None:
    config = load_config({"codec": "raw", "chunk_tokens": 32})
    lookup = artifact_lookup.look_up(SimpleNamespace(), config, CACHE)
    assert lookup == Lookup(config, None, "")
    (bound,) = artifact_lookup.record_bounds(SimpleNamespace(), lookup, CACHE)
    codec = open_codec("raw", SHAPE.dtype, geometry=GEOMETRY)
    assert len(codec.encode(noise(32, 1), noise(32, 2), 0)) == bound


@pytest.mark.parametrize("sink_tokens", [-1, 256])
def test_a_card_with_impossible_sinks_is_refused(tmp_path: Path, sink_tokens: int) -> None:
    save_card(tmp_path, card(sink_tokens))
    lookup = Lookup(load_config({}), tmp_path, "")
    with pytest.raises(ArtifactError, match=f"sink_tokens is {sink_tokens}, 0 to 255 are right"):
        artifact_lookup.record_bounds(SimpleNamespace(), lookup, CACHE)


def test_a_quality_becomes_a_ratio_before_anything_is_sized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the artifact that has it is the one that is loaded."""
    point = CurvePoint(ratio=RATIO, real_ratio=RATIO, kl=0.002, low=0.001, high=0.003)
    curve = CurveCard(
        documents=(3,),
        prefix_tokens=768,
        exact_tokens=128,
        scored_tokens=128,
        chunk_tokens=128,
        points=(point,),
    )
    save_card(tmp_path, msgspec.structs.replace(card(4), curve=curve))
    asked: list[float | None] = []

    def find(*_: object, quality: float | None, **__: object) -> Path:
        asked.append(quality)
        return tmp_path

    monkeypatch.setattr(artifact_lookup.registry, "find", find)
    identity = SimpleNamespace(identity="files")
    monkeypatch.setattr(artifact_lookup, "model_identity", lambda *_: identity)
    model: Any = SimpleNamespace(model="somewhere", revision=None)
    config = load_config({"quality": 0.0025, "registry": [str(tmp_path)]})
    found = artifact_lookup.look_up(model, config, CACHE)
    assert asked == [0.0025]  # once
    assert (found.config.target_ratio, found.config.quality) == (RATIO, None)
    assert found.config.artifact == str(tmp_path)
    assert (found.directory, found.files) == (tmp_path, "files")
    plain = load_config({"ratio": 8})
    assert artifact_lookup.look_up(model, plain, CACHE).config is plain
