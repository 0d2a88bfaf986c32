"""The start-up self-test on artifacts with weights, with and without pairs: errors are of weighted
rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.connector.selftest import run_self_test
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=32)
LAYER = 2 * 32
SMALL = 1 / 64
"""Layer 0 is so much smaller than layer 1, and weighs so much more."""


def weighted(fitted: RankArtifact) -> RankArtifact:
    """Its weighted rows, and their errors, are those of the plain model."""
    own = torch.ones(2 * LAYER)
    own[:LAYER] = 1 / SMALL
    sections = {}
    for (group, name), s in fitted.sections.items():
        weights = own.repeat(len(name))
        errors = {r: plan.expected_error for r, plan in s.plans.items()}
        mean = s.mean / weights
        sections[group, name] = replace(s, mean=mean, weights=weights, heldout_error=errors)
    return replace(fitted, sections=sections)


@pytest.fixture(scope="module")
def pairs() -> RankArtifact:
    return weighted(step_artifact(MODEL, (4.0,), paired=True))


@pytest.fixture(scope="module", params=["apart", "paired"])
def artifact(request: pytest.FixtureRequest) -> RankArtifact:
    if request.param == "apart":
        return weighted(MODEL.artifact((4.0,)))
    found: RankArtifact = request.getfixturevalue("pairs")
    return found


def probe_of() -> Probe:
    """Rows that the artifact was made for."""
    rows = {kind: MODEL.rows(128, 0, kind, seed=4) for kind in ("k", "v")}
    for values in rows.values():
        values[:, :LAYER] *= SMALL
    k, v = (values.view(128, 2, 2, 32).half() for values in rows.values())
    return Probe(k, v, torch.arange(128, dtype=torch.int32))


def errors(artifact: RankArtifact, probe: Probe) -> dict[str, float]:
    names = ("layers.0", "layers.1")
    group = CacheGroup(names, 32, 2, 32, 32, torch.bfloat16, torch.bfloat16)
    caches = {name: torch.zeros(6, 2, 32, 64, dtype=torch.bfloat16) for name in names}
    codec = (Kvtc2Codec if artifact.codec == "kvtc2" else KvtcCodec)(artifact, 4.0, torch.bfloat16)
    layout = PagedLayout(caches, group)
    transfer = TorchTransfer(layout, codec, 128)
    return {**run_self_test(codec, transfer, probe, layout, 128)}


def test_the_error_is_the_promised_one(
    artifact: RankArtifact, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="vllm.kvtc"):
        found = errors(artifact, probe_of())
    assert tuple(found) == artifact.section_names
    for name in artifact.section_names:
        promised = artifact.sections[0, name].heldout_error[4.0]
        assert found[name] == pytest.approx(promised, rel=0.5, abs=2e-3)
        assert f" {name.upper()} {found[name]:.4f} (held-out {promised:.4f}, bf" in caplog.text


def test_a_small_layer_that_weighs_much_is_watched(
    artifact: RankArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it loses shows in weighted rows; of plain rows it is a thousandth."""
    codec = Kvtc2Codec if artifact.codec == "kvtc2" else KvtcCodec
    decode = codec.decode

    def lose_layer_0(self, *args, **more):  # type: ignore[no-untyped-def]
        chunk = decode(self, *args, **more)
        chunk.k[:, 0] = 0
        return chunk

    monkeypatch.setattr(codec, "decode", lose_layer_0)
    with pytest.raises(ArtifactError, match=r"self-test failed: relative squared error of KV? is"):
        errors(artifact, probe_of())


def test_a_part_of_a_pair_that_weighs_little_is_watched(
    pairs: RankArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V that the cache exchanges between heads costs little of both."""
    whole = pairs.sections[0, "kv"]
    weights = whole.weights.clone()  # type: ignore[union-attr]
    weights[pairs.geometry.row_parts(0, "kv")["v"]] /= 10
    light = replace(pairs, sections={(0, "kv"): replace(whole, weights=weights)})
    probe = probe_of()
    errors(light, probe)
    load = TorchTransfer.load

    def exchange(self, items):  # type: ignore[no-untyped-def]
        found = load(self, items)
        blocks = items[0][0].block_ids
        k, v = self._layout.gather(blocks)
        self._layout.scatter(blocks, k, v.flip(2))
        return found

    monkeypatch.setattr(TorchTransfer, "load", exchange)
    with pytest.raises(ArtifactError, match=r"error of V is \d\S*, the codec without the KV cache"):
        errors(light, probe)
