"""What tests of the codec share."""

from __future__ import annotations

import pytest

from kvtc_vllm.codec.cpu.codec import CpuKvtcCodec
from tests.codec.int8_codec import Int8Codec

FAST = {"fast": CpuKvtcCodec, "int8": Int8Codec}


@pytest.fixture(params=["reference", *FAST])
def each_way(request, monkeypatch):
    """What the test's module calls `KvtcCodec` is the reference, then each fast way."""
    if request.param in FAST:
        monkeypatch.setattr(request.module, "KvtcCodec", FAST[request.param])
