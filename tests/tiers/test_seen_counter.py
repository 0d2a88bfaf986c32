"""Admission by how many requests have contained a chunk."""

from __future__ import annotations

from kvtc_vllm.offload.seen_counter import SeenCounter


def test_a_threshold_of_one_admits_all_and_remembers_nothing() -> None:
    seen = SeenCounter(1)
    assert all(seen.admits(bytes([i])) for i in range(9))
    assert not seen._counts


def test_a_chunk_is_admitted_from_its_nth_request_on() -> None:
    seen = SeenCounter(3)
    assert [seen.admits(b"a") for _ in range(5)] == [False, False, True, True, True]
    assert not seen.admits(b"b")


def test_the_least_recently_seen_is_forgotten_first() -> None:
    seen = SeenCounter(2, remembered=2)
    for key in (b"a", b"b", b"c"):
        assert not seen.admits(key)
    assert seen.admits(b"b")
    assert not seen.admits(b"a")  # takes the place of "c"
    assert not seen.admits(b"c")
