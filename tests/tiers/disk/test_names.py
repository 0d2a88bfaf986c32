"""Names of many files are read as one by one, whatever they are."""

from __future__ import annotations

import os

import pytest

from kvtc_vllm.tiers.disk import layout
from kvtc_vllm.tiers.disk.layout import MAX_KEY_BYTES, chunk_key, keys_of_names

KEY = bytes(range(32))
SOUND = f"{KEY.hex()}.kvtc"
GROUP = f"{KEY.hex()}01.kvtc"
LONGEST = f"{'ab' * MAX_KEY_BYTES}.kvtc"
OTHERS = [
    "",
    ".kvtc",
    "a.kvtc",
    "abc.kvtc",
    "ab",
    "kvtc",
    f"{KEY.hex().upper()}.kvtc",
    f"{KEY.hex()[:-2]}  .kvtc",
    f"{KEY.hex()[:-1]} .kvtc",
    f" {KEY.hex()[:-1]}.kvtc",
    f"{KEY.hex()[:-1]}g.kvtc",
    f"{KEY.hex()[:-1]}\udc80.kvtc",
    f"{KEY.hex()[:-1]}ä.kvtc",
    f"{KEY.hex()[:-1]}٣.kvtc",
    f"{KEY.hex()}.kvtc.kvtc",
    f"{KEY.hex()}.body",
    f"{'ab' * (MAX_KEY_BYTES + 1)}.kvtc",
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("place", ["alone", "first", "last", "between", "twice"])
def test_a_name_that_is_none_changes_no_other(other: str, place: str) -> None:
    names = {
        "alone": [other],
        "first": [other, SOUND, GROUP],
        "last": [SOUND, GROUP, other],
        "between": [SOUND, other, LONGEST],
        "twice": [other, SOUND, other],
    }[place]
    assert chunk_key(other) is None
    assert keys_of_names(names) == [chunk_key(name) for name in names]


def test_two_halves_of_a_space_are_no_key() -> None:
    """Joined, they have what one alone has not: an even number of digits."""
    names = ["abc.kvtc", "d.kvtc"]
    assert keys_of_names(names) == [None, None]


def test_chunks_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [os.urandom(length) for length in (32, 33, 1, MAX_KEY_BYTES) * 50]
    monkeypatch.setattr(layout, "chunk_key", None)  # not called
    assert keys_of_names([f"{key.hex()}.kvtc" for key in keys]) == keys
    assert keys_of_names([]) == []
