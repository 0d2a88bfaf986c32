"""Our connector and another one in vLLM's `MultiConnector`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.config import kv_transfer_config
from kvtc_vllm.vllm_cache.compat import vllm_version
from tests.connector.engine import engine, greedy, metrics, texts

pytestmark = pytest.mark.vllm

CHUNKS = 5
"""Of a prompt of 700 tokens."""


@pytest.mark.skipif(
    vllm_version().startswith("0.28"),
    reason="its MultiConnector takes children's statistics only as another process sends them",
)
def test_what_another_connector_loads_is_not_stored(reference_model: Path, tmp_path: Path) -> None:
    from vllm.config import KVTransferConfig

    from tests.connector import other_connector

    prompts = texts(reference_model, count=2, tokens=700)
    ours = kv_transfer_config(
        {
            "preset": "raw",
            "memory_bytes": "256MiB",
            "disk_path": str(tmp_path),
            "disk_bytes": "64MiB",
            "disk_min_free": 0,
            "load_gate": False,
        }
    )
    other = {
        "kv_connector": "OtherConnector",
        "kv_connector_module_path": other_connector.__name__,
        "kv_role": "kv_both",
    }
    both = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": [other, ours]},
    )
    with engine(reference_model, None, kv_transfer_config=both) as llm:
        (right,) = greedy(llm, prompts[1:], 16)
        assert metrics(llm)["kvtc_stored_chunks"] == CHUNKS
        other_connector.OFFERED["tokens"] = 512
        try:
            greedy(llm, prompts[:1], 16)
        finally:
            other_connector.OFFERED["tokens"] = 0
        # The same prompt again begins on what vLLM's cache has of the other one.
        greedy(llm, prompts[:1], 16)
        assert metrics(llm)["kvtc_stored_chunks"] == CHUNKS
        assert llm.reset_prefix_cache()
        assert greedy(llm, prompts[1:], 16) == [right]
        greedy(llm, prompts[:1], 16)
        found = metrics(llm)
        assert found["kvtc_loaded_tokens"] == 128 * CHUNKS
        assert found["kvtc_stored_chunks"] == 2 * CHUNKS
