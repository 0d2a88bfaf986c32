"""Names of chunks, and what a request may say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvtc_vllm.offload.keys import LOAD, STORE, allowed, chunk_keys
from tests.connector.fakes import FakeRequest, fill, scheduler, start


def test_a_key_is_vllms_hash_and_the_adapters_digest() -> None:
    request = FakeRequest("r", 300)
    assert chunk_keys(request, 4, b"") == [b"a:3", b"a:7"]
    assert chunk_keys(request, 4, b"", 1, 2) == [b"a:7"]
    assert chunk_keys(request, 4, b"digest") == [b"a:3digest", b"a:7digest"]
    assert chunk_keys(FakeRequest("r", 127), 4, b"") == []


@pytest.mark.parametrize("params", [None, {}, {LOAD: True}, {"other": False}])
def test_everything_is_allowed_unless_said(params: Any) -> None:
    request = SimpleNamespace(kv_transfer_params=params)
    assert allowed(request, LOAD)
    assert allowed(request, STORE)
    assert allowed(SimpleNamespace(), LOAD)


def test_each_direction_is_turned_off_by_itself() -> None:
    request = SimpleNamespace(kv_transfer_params={LOAD: False})
    assert not allowed(request, LOAD)
    assert allowed(request, STORE)


@pytest.mark.parametrize("value", [0, 1, None, "false", "no", [], {"a": []}, 0.0, "x" * 10**6])
def test_what_is_not_true_or_false_is_ignored(value: Any) -> None:
    """Clients send what they like; an unhashable value must not end the engine."""
    assert allowed(SimpleNamespace(kv_transfer_params={LOAD: value}), LOAD)


@pytest.mark.parametrize("params", ["kvtc_load", ["kvtc_load"], 7])
def test_parameters_of_another_type_are_ignored(params: Any) -> None:
    assert allowed(SimpleNamespace(kv_transfer_params=params), LOAD)


def test_requests_that_opted_out_neither_load_nor_store() -> None:
    side = scheduler(recent_window=0)
    silent = FakeRequest("silent", 257)
    silent.kv_transfer_params = {STORE: False}  # type: ignore[attr-defined]
    assert start(side, silent, list(range(9)), 257).stores == []
    fill(side, FakeRequest("r", 257))
    assert side.match(FakeRequest("again", 257), 0) == 256
    deaf = FakeRequest("deaf", 257)
    deaf.kv_transfer_params = {LOAD: False}  # type: ignore[attr-defined]
    assert side.match(deaf, 0) == 0
    logprobs = FakeRequest("logprobs", 257)
    logprobs.skip_reading_prefix_cache = True  # type: ignore[attr-defined]
    assert side.match(logprobs, 0) == 0


def test_requests_that_may_not_load_are_no_misses() -> None:
    side = scheduler(recent_window=0)
    fill(side, FakeRequest("r", 257))
    side.take_stats()
    deaf, logprobs = FakeRequest("deaf", 257), FakeRequest("logprobs", 300)
    deaf.kv_transfer_params = {LOAD: False}  # type: ignore[attr-defined]
    logprobs.skip_reading_prefix_cache = True  # type: ignore[attr-defined]
    for request, blocks in ((deaf, list(range(9))), (logprobs, list(range(10)))):
        start(side, request, blocks, request.num_tokens)
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["bypassed_tokens"] == 557
    assert "lookup_tokens" not in stats.data


def test_roles_keep_to_their_side() -> None:
    producer, consumer = scheduler(recent_window=0, loads=False), scheduler(stores=False)
    fill(producer, FakeRequest("r", 257))
    assert len(producer.index) == 2
    assert producer.match(FakeRequest("again", 257), 0) == 0
    assert start(consumer, FakeRequest("r", 257), list(range(9)), 257).stores == []
