"""The start-up self-test on an artifact with weights: errors are of weighted rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.connector.selftest import run_self_test
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.codec.synthetic import SyntheticModel

MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=32)
LAYER = 2 * 32
SMALL = 1 / 64
"""Layer 0 is so much smaller than layer 1, and weighs so much more."""


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    """Its weighted rows, and their errors, are those of the plain model."""
    fitted = MODEL.artifact((4.0,))
    weights = torch.ones(2 * LAYER)
    weights[:LAYER] = 1 / SMALL
    sections = {
        key: replace(
            s,
            mean=s.mean / weights,
            weights=weights,
            heldout_error={r: plan.predicted_error for r, plan in s.plans.items()},
        )
        for key, s in fitted.sections.items()
    }
    return replace(fitted, sections=sections)


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
    codec = KvtcCodec(artifact, 4.0, torch.bfloat16)
    layout = PagedLayout(caches, group)
    found = run_self_test(codec, TorchTransfer(layout, codec, 128), probe, layout, 128)
    return {kind: found[kind] for kind in ("k", "v")}


def test_the_error_is_the_promised_one(artifact: RankArtifact) -> None:
    found = errors(artifact, probe_of())
    for kind in ("k", "v"):
        promised = artifact.sections[0, kind].heldout_error[4.0]
        assert found[kind] == pytest.approx(promised, rel=0.5, abs=2e-3)


def test_a_small_layer_that_weighs_much_is_watched(
    artifact: RankArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it loses shows in weighted rows; of plain rows it is a thousandth."""
    decode = KvtcCodec.decode

    def lose_layer_0(self, *args, **more):  # type: ignore[no-untyped-def]
        chunk = decode(self, *args, **more)
        chunk.k[:, 0] = 0
        return chunk

    monkeypatch.setattr(KvtcCodec, "decode", lose_layer_0)
    with pytest.raises(ArtifactError, match="self-test failed: relative squared error of K"):
        errors(artifact, probe_of())
