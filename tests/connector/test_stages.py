"""What a pipeline stage takes of an artifact of all layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.connector.stages import stage_artifact, stage_geometry, world_rank
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup
from tests.codec.synthetic import make_artifact

GROUPS = ((0, 1), (1, 2), (2, 4))
WHOLE = Geometry(4, 2, 16, 16, GROUPS)
RATIO = 8.0


def test_a_stage_codes_its_layers_as_the_whole_does() -> None:
    whole = make_artifact(layer_groups=GROUPS, ratios=(RATIO,))
    k, v = torch.randn(2, 40, 4, 2, 16).to(torch.bfloat16)
    together = open_codec("kvtc", torch.bfloat16, artifact=whole, ratio=RATIO)
    expected = together.decode(together.encode(k, v, 0))
    fingerprints = {whole.fingerprint}
    for first, end in ((0, 2), (2, 4)):
        part = stage_artifact(whole, first, end)
        fingerprints.add(part.fingerprint)
        codec = open_codec("kvtc", torch.bfloat16, artifact=part, ratio=RATIO)
        found = codec.decode(codec.encode(k[:, first:end], v[:, first:end], 0))
        assert torch.equal(found.k, expected.k[:, first:end])
        assert torch.equal(found.v, expected.v[:, first:end])
    assert len(fingerprints) == 3
    assert stage_artifact(whole, 0, 4) is whole


def test_a_layer_group_over_a_border_is_refused() -> None:
    assert stage_geometry(WHOLE, 2, 4).layer_groups == ((0, 2),)
    for first, end in ((0, 3), (3, 4)):
        with pytest.raises(ArtifactError, match=r"groups of 1, 1, 2, .*--layers-per-group"):
            stage_geometry(WHOLE, first, end)
    whole = make_artifact(layer_groups=GROUPS, ratios=(RATIO,))
    with pytest.raises(ArtifactError, match="codec kvtc2 has one step for all layers"):
        stage_artifact(replace(whole, codec="kvtc2"), 0, 2)


def test_workers_are_counted_over_all_stages() -> None:
    group = CacheGroup(("layers.0",), 16, 1, 64, 64, torch.bfloat16)
    geometry = CacheGeometry((group,), 2, pp_size=3)
    ranks = [world_rank(geometry, stage, tensor) for stage in range(3) for tensor in range(2)]
    assert ranks == list(range(geometry.ranks))
