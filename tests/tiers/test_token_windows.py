"""Chunks with the same tokens are found, at any shift and in parts."""

from __future__ import annotations

import random
from array import array

import pytest

from kvtc_vllm.tiers import token_windows
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.token_windows import LEAST_RUN, WINDOW, Run, TokenWindows

CHUNK = 128
US, THEM = b"us", b"them"


def key(name: str) -> RecordKey:
    return RecordKey(name.encode())


def ids(seed: int, count: int = CHUNK) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=count)


def packed(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


@pytest.mark.parametrize("shift", [0, 1, 5, 63, 90])
def test_a_passage_is_found_over_two_chunks_of_another_grid(shift: int) -> None:
    windows = TokenWindows()
    text = ids(0, 3 * CHUNK)
    for number in range(3):
        own = text[number * CHUNK : (number + 1) * CHUNK]
        windows.add(key(f"chunk {number}"), US, packed(own))
    found = windows.find(key("new"), US, packed(text[shift : shift + CHUNK]))
    assert found is not None
    covered = [0] * CHUNK
    for token, source, source_token, length in found.runs:
        other = int(found.sources[source].decode()[-1])
        for i in range(length):
            covered[token + i] += 1
            assert shift + token + i == other * CHUNK + source_token + i
    # All of it, but for a part too short to hold a window that is kept.
    assert max(covered) == 1
    assert sum(covered) >= CHUNK - min(shift, CHUNK - shift)
    assert sum(covered) == CHUNK or min(shift, CHUNK - shift) < 2 * WINDOW


def test_a_run_ends_where_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which windows are kept follows from the process's hash seed; few lie behind the edit.
    monkeypatch.setattr(token_windows, "_SAMPLED", 1)
    windows = TokenWindows()
    old = ids(1)
    windows.add(key("old"), US, packed(old))
    edited = [*old[:70], 7, 7, 7, *old[72:-1]]
    found = windows.find(key("new"), US, packed(edited))
    assert found is not None
    assert found.sources == (key("old"),)
    assert found.runs == (Run(0, 0, 0, 70), Run(73, 0, 72, 55))


def test_unlike_tokens_and_other_tenants_are_not_found() -> None:
    windows = TokenWindows()
    windows.add(key("old"), US, packed(ids(2)))
    assert windows.find(key("new"), US, packed(ids(3))) is None
    assert windows.find(key("new"), THEM, packed(ids(2))) is None
    assert windows.find(key("old"), US, packed(ids(2))) is None  # itself
    assert windows.find(key("new"), US, packed(ids(2)[:LEAST_RUN])) is None
    assert windows.find(key("new"), US, b"") is None


def test_windows_are_the_last_one_s_and_go_with_it() -> None:
    windows = TokenWindows()
    for name in ("first", "second"):
        windows.add(key(name), US, packed(ids(4)))
    found = windows.find(key("new"), US, packed(ids(4)))
    assert found is not None
    assert found.sources == (key("second"),)
    windows.remove(key("first"))  # whose windows are the second's by now
    assert windows.find(key("new"), US, packed(ids(4))) == found
    windows.remove(key("second"))
    assert windows.find(key("new"), US, packed(ids(4))) is None
    assert len(windows) == 0
    assert not windows._windows


def test_one_token_again_and_again_ends() -> None:
    windows = TokenWindows()
    windows.add(key("old"), US, packed([1] * CHUNK))
    found = windows.find(key("new"), US, packed([1] * CHUNK))
    if found is not None:  # if the only window is one that is kept
        assert sum(run.length for run in found.runs) <= CHUNK
