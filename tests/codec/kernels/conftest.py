"""What tests of batches share."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.streams import SideStream


@pytest.fixture
def side_stream(request):
    """As in serving, which uses no default stream."""
    device = getattr(request.node, "callspec", None) and request.node.callspec.params.get("device")
    with SideStream(torch.device(device or "cpu")).to_end():
        yield


@pytest.fixture(scope="module")
def artifact(request):
    """Of the codec that the parameter names."""
    from tests.codec.kernels.codecs import artifact_of  # these need Triton
    from tests.codec.kernels.paged_batches import MODEL

    return artifact_of(request.param, MODEL, (4.0, 8.0))
