"""The public language model, for tests that need answers in plain English."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.models import ModelError, Unreachable, smollm2

OF_THE_TESTS = "kvtc-tests-"
"""How the cache directory begins that tests get for themselves (tests/conftest.py)."""


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """Directory of SmolLM2 135M Instruct, from the user's cache; downloaded the first time.

    Skips where it is not there and cannot be downloaded, or gguf is missing. Tests that ask for
    it are `slow`.
    """
    with pytest.MonkeyPatch.context() as patch:
        # A cache that ends with the tests would have them download 93 MB every time.
        if Path(os.environ["KVTC_CACHE_DIR"]).name.startswith(OF_THE_TESTS):
            patch.delenv("KVTC_CACHE_DIR")
        try:
            return smollm2()
        except Unreachable as error:
            pytest.skip(f"SmolLM2 is not in the cache and cannot be downloaded: {error}")
        except ModelError:
            pytest.importorskip(
                "gguf", reason="conversion needs gguf: pip install 'kvtc-vllm[dev]'"
            )
            raise
