"""Keys on disk are vLLM's block hashes: who can't make them again must not use a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.vllm_cache.compat import UnsupportedError
from tests.connector.engine import engine, greedy
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.stepping import chunk_files, count, raw

pytestmark = pytest.mark.vllm


def test_random_hashes_are_refused_with_a_directory(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED")
    disk = tmp_path / "tier"
    with (
        pytest.raises(UnsupportedError, match="PYTHONHASHSEED"),
        engine(reference_model, raw(disk), prefix_caching_hash_algo="xxhash"),
    ):
        pass
    assert not disk.exists()


@pytest.mark.parametrize("algorithm", ["xxhash", "sha256"])
def test_another_hash_seed_is_another_namespace(
    algorithm: str,
    reference_model: Path,
    prompts: Tokens,
    before: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespaces: list[set[str]] = []
    for seed, loaded in (("1", 0), ("2", 0), ("1", 608)):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        with engine(reference_model, raw(tmp_path), prefix_caching_hash_algo=algorithm) as llm:
            assert greedy(llm, prompts[:1], ANSWER) == before[:1]
            assert count(llm, "loaded_tokens") == loaded
        namespaces.append(set(chunk_files(tmp_path)))
    first, second, third = namespaces
    assert len(first) == 1
    assert len(second) == 2
    assert third == second
