"""An artifact's parts for several cache groups: each codes its own layers, all bytes count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sensitivity import Part, kept_kinds, parse_artifact, through, ways
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import open_codec
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(num_layers=3, num_kv_heads=2, head_size=16, head_size_v=24)
TOKENS, CHUNK, HEADS, SIZE = 10, 4, 2, 8


def raw(layers: int) -> ChunkCodec:
    geometry = Geometry(
        num_layers=layers,
        num_kv_heads=HEADS,
        head_size=SIZE,
        head_size_v=SIZE,
        layer_groups=((0, layers),),
    )
    return open_codec("raw", torch.bfloat16, geometry=geometry)


def test_layers_of_every_part_come_back_in_their_places() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, TOKENS, 3, HEADS, SIZE, generator=generator).bfloat16()

    stored, back_k, back_v = through([([1], raw(1)), ([0, 2], raw(2))], k, v, CHUNK)

    assert torch.equal(back_k, k)
    assert torch.equal(back_v, v)
    alone, _, _ = through([([0], raw(1))], k[:, :1], v[:, :1], CHUNK)
    both, _, _ = through([([0, 1], raw(2))], k[:, :2], v[:, :2], CHUNK)
    assert stored == alone + both
    assert stored > k.nbytes + v.nbytes


def test_an_artifact_may_have_ratios_of_its_own() -> None:
    assert parse_artifact("a=dir:8,16", "32") == ("a", Path("dir"), [8.0, 16.0])
    assert parse_artifact("a=dir", "32,64") == ("a", Path("dir"), [32.0, 64.0])


def test_halved_blobs_are_those_of_the_plans_that_are_nested() -> None:
    artifact = step_artifact(MODEL, (6.0,), None, halvings=2)
    parts = [Part(range(MODEL.num_layers), artifact)]
    found = ways("it", parts, 6.0, 2)
    assert list(found) == ["it", "it halved 1", "it halved 2"]
    k, v = (x.bfloat16() for x in MODEL.chunk(128, 0, seed=3))
    sizes, errors = [], []
    for coders in found.values():
        stored, _, back = through(coders, k, v, 64)
        sizes.append(stored)
        errors.append(float((back.float() - v.float()).square().sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < errors[2]
    with pytest.raises(ArtifactError, match="no plan of the artifact is nested"):
        ways("it", [Part(range(MODEL.num_layers), step_artifact(MODEL, (6.0,), None))], 6.0, 1)


def test_other_kinds_of_text_stay_in_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    about = {"command": "first", "model": "m"}
    assert kept_kinds(out, about, ["essays"]) == ([], [])
    row = {"kind": "essays", "kl": 1.0}
    out.write_text(json.dumps(about | {"documents": ["a"], "rows": [row]}))
    second = {"command": "second", "model": "m"}
    assert kept_kinds(out, second, ["maths"]) == (["a"], [row])
    assert second["command"] == "first; second"
    with pytest.raises(SystemExit, match="has rows of essays"):
        kept_kinds(out, {"command": "", "model": "m"}, ["essays"])
    with pytest.raises(SystemExit, match="another model"):
        kept_kinds(out, {"command": "", "model": "n"}, ["maths"])
