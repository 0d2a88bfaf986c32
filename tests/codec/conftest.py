"""What tests of the codec share."""

from __future__ import annotations

import pytest

from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec


@pytest.fixture(params=["reference", "fast"])
def each_way(request, monkeypatch):
    """What the test's module calls `KvtcCodec` is the reference once, once the fast way."""
    if request.param == "fast":
        monkeypatch.setattr(request.module, "KvtcCodec", CpuKvtcCodec)
