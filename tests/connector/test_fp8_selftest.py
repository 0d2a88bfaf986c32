"""The start-up self-test on fp8 caches: what rounding costs is allowed, anything more is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.connector import selftest
from kvtc_vllm.connector.selftest import run_self_test
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.codec.synthetic import SyntheticModel

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU build has fp8 caches with AVX-512"
)
MODEL = SyntheticModel(num_layers=2, num_kv_heads=2, head_size=32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALES = {"k": torch.tensor([0.1, 0.7]), "v": torch.tensor([3.0, 0.02])}


@pytest.fixture(scope="module")
def artifact() -> RankArtifact:
    """With scales, and the errors of the fit as its promise."""
    fitted = MODEL.artifact((4.0,))
    sections = {
        key: replace(s, heldout_error={r: plan.predicted_error for r, plan in s.plans.items()})
        for key, s in fitted.sections.items()
    }
    return replace(fitted, sections=sections, scales=SCALES)


def probe_of(offset: float = 0.0) -> Probe:
    k, v = ((MODEL.rows(128, 0, kind, seed=4) + offset).view(128, 2, 2, 32).half() for kind in "kv")
    return Probe(k, v, torch.arange(128, dtype=torch.int32))


def errors(artifact: RankArtifact, probe: Probe, dtype: torch.dtype) -> dict[str, float]:
    names = ("layers.0", "layers.1")
    group = CacheGroup(names, 32, 2, 32, 32, dtype, torch.bfloat16)
    stored = torch.uint8 if dtype.itemsize == 1 else dtype
    caches = {name: torch.zeros(6, 2, 32, 64, dtype=stored) for name in names}
    codec = KvtcCodec(artifact, 4.0, dtype)
    layout = PagedLayout(caches, group)
    transfer = TorchTransfer(layout, codec, 128)
    found = run_self_test(codec, transfer, probe, layout, 128)
    assert not any(cache.view(torch.uint8).any() for cache in caches.values())
    return {kind: found[kind] for kind in ("k", "v")}


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_costs_its_rounding(artifact: RankArtifact, dtype: torch.dtype) -> None:
    exact = errors(replace(artifact, scales=None), probe_of(), torch.float32)
    found = errors(artifact, probe_of(), dtype)
    for kind in found:
        # 2 to 5 % of each element, twice, on rows whose mean is as large as their deviation.
        assert exact[kind] < found[kind] < exact[kind] + {E4M3: 0.006, E5M2: 0.024}[dtype]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rows_that_do_not_fit_are_refused(artifact: RankArtifact, dtype: torch.dtype) -> None:
    probe = probe_of()
    shuffled = Probe(probe.k.flip(3), probe.v.flip(3), probe.positions)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ArtifactError, match=f"self-test failed.* and {name} costs 0"):
        errors(artifact, shuffled, dtype)


def test_rounding_is_allowed_for(artifact: RankArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows far from zero: E5M2's rounding is large against their deviation from the mean."""
    sections = {key: replace(s, mean=s.mean + 14) for key, s in artifact.sections.items()}
    far = replace(artifact, sections=sections)
    # The synthetic model promises little at this ratio: four times that would hide the rounding.
    monkeypatch.setattr(selftest, "GROSS_FACTOR", 1.0)
    errors(far, probe_of(14), E5M2)
    monkeypatch.setattr(selftest, "ROUNDINGS", 0.0)
    errors(artifact, probe_of(), E5M2)
    with pytest.raises(ArtifactError, match="self-test failed"):
        errors(far, probe_of(14), E5M2)
