"""What a chain of block hashes starts from, and where that ends the start of an engine."""

from __future__ import annotations

import pytest

from kvtc_vllm.vllm_cache.compat import (
    RANDOM,
    UnsupportedError,
    check_stable_hashes,
    hash_seed_fact,
    vllm_version,
)

pytestmark = pytest.mark.vllm

ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")


@pytest.mark.parametrize("seed", [None, "0", "random", ""])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hashes_are_refused_exactly_where_this_vllm_starts_them_at_random(
    seed: str | None, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"", raising=False)
    hash_function = get_hash_fn_by_name(algorithm)
    starts = []
    for _ in range(2):
        kv_cache_utils.init_none_hash(hash_function)
        starts.append(kv_cache_utils.NONE_HASH)
    fact = hash_seed_fact(vllm_version(), algorithm)
    assert (starts[0] != starts[1]) == (fact == RANDOM)
    if fact == RANDOM:
        with pytest.raises(UnsupportedError, match="set PYTHONHASHSEED=0"):
            check_stable_hashes(vllm_version(), algorithm)
    else:
        check_stable_hashes(vllm_version(), algorithm)
        assert starts[0] == hash_function(fact.removeprefix("seed ").strip("'"))


@pytest.mark.parametrize(
    ("version", "algorithm", "seed", "fact"),
    [
        ("0.26.0", "sha256", None, RANDOM),
        ("0.28.0+cpu", "sha256_cbor", None, RANDOM),
        ("0.28.0", "xxhash", "0", "seed '0'"),
        ("0.29.0", "sha256", None, "seed 'vllm-none-hash'"),
        ("0.32.0+cpu", "sha256_cbor", None, "seed 'vllm-none-hash'"),
        ("0.32.0", "xxhash", None, RANDOM),
        ("0.33.1", "xxhash_cbor", None, RANDOM),
        ("0.33.1", "a later one", None, RANDOM),
        ("0.33.1", "xxhash_cbor", "7", "seed '7'"),
        ("0.32.0", "sha256", "random", "seed 'random'"),
    ],
)
def test_what_the_chain_starts_from_in_each_release(
    version: str,
    algorithm: str,
    seed: str | None,
    fact: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    assert hash_seed_fact(version, algorithm) == fact
