"""Chunks with the same tokens are found, at any shift and in parts."""

from __future__ import annotations

import random
from array import array

import pytest

from kvtc_vllm.tiers import token_windows
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.token_windows import LEAST_RUN, SHORT_WINDOW, WINDOW, Run, TokenWindows

CHUNK = 128
US, THEM = b"us", b"them"


@pytest.fixture(autouse=True)
def every_window_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ones are kept otherwise follows from the process's hash seed."""
    monkeypatch.setattr(token_windows, "_SAMPLED", 1)


def key(name: str) -> RecordKey:
    return RecordKey(name.encode())


def ids(seed: int, count: int = CHUNK) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=count)


def packed(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


@pytest.mark.parametrize("shift", [0, 1, 5, 10, 63, 90, 118])
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
    # All of it, but for a part too short to hold a short window.
    assert max(covered) == 1
    part = min(shift, CHUNK - shift)
    assert sum(covered) == CHUNK - (part if part < SHORT_WINDOW else 0)


def test_some_windows_of_a_chunk_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    windows = TokenWindows()
    windows.add(key("old"), US, packed(ids(5)))
    assert 0 < len(windows._windows) < CHUNK - WINDOW + 1
    found = windows.find(key("new"), US, packed(ids(5)))
    assert found is not None
    assert found.runs == (Run(0, 0, 0, CHUNK),)


def test_a_run_ends_where_tokens_differ() -> None:
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
    assert not windows._edges


def test_a_neighbour_is_the_tenant_s_own() -> None:
    """The short part of a text is in another tenant's chunk, and in the first one's own."""
    text = ids(10, 2 * CHUNK)
    new = packed(text[10 : CHUNK + 10])
    for tenant, sources in ((US, 2), (THEM, 1)):
        windows = TokenWindows()
        windows.add(key("first"), US, packed(text[:CHUNK]))
        windows.add(key("second"), tenant, packed(text[CHUNK:]))
        found = windows.find(key("new"), US, new)
        assert found is not None
        assert len(found.sources) == sources
        windows.remove(key("second"))
        alone = windows.find(key("new"), US, new)
        assert alone is not None
        assert alone.sources == (key("first"),)


def test_one_token_again_and_again_ends() -> None:
    windows = TokenWindows()
    windows.add(key("old"), US, packed([1] * CHUNK))
    found = windows.find(key("new"), US, packed([1] * CHUNK))
    assert found is not None
    assert sum(run.length for run in found.runs) <= CHUNK


def test_what_edits_moved_in_a_chunk_that_was_found_is_found_by_short_windows() -> None:
    """Three edits, none of which leaves a window's length of tokens between itself and the next."""
    windows = TokenWindows()
    old = ids(6)
    windows.add(key("old"), US, packed(old))
    windows.add(key("other"), US, packed(ids(7)))
    edited = [*old[:60], 7, 7, *old[60:75], 8, *old[76:90], *old[91:99], 9, *old[99:106], 9, 9]
    found = windows.find(key("new"), US, packed(edited))
    assert found is not None
    assert found.sources == (key("old"),)
    assert found.runs == (
        Run(0, 0, 0, 60),
        Run(62, 0, 60, 15),
        Run(78, 0, 76, 14),
        Run(92, 0, 91, SHORT_WINDOW),
    )


def test_short_windows_alone_find_nothing() -> None:
    """Or any phrase would make a representative of its chunk."""
    windows = TokenWindows()
    old = ids(8)
    windows.add(key("old"), US, packed(old))
    new = [*old[: WINDOW - 1], *ids(9, CHUNK - WINDOW + 1)]
    assert windows.find(key("new"), US, packed(new)) is None


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_what_both_have_and_do_not_overlap(seed: int) -> None:
    """Few different tokens, so that windows occur again and again."""
    rng = random.Random(seed)
    windows = TokenWindows()
    chunks = {key(str(n)): rng.choices(range(3), k=rng.randrange(200)) for n in range(4)}
    for name, own in chunks.items():
        windows.add(name, US, packed(own))
    base = rng.choice(list(chunks.values()))
    new = [rng.randrange(3) if rng.random() < 0.03 else token for token in base]
    found = windows.find(key("new"), US, packed(new))
    covered = [0] * len(new)
    for token, source, place, length in found.runs if found else ():
        theirs = chunks[found.sources[source]]  # type: ignore[union-attr]
        assert new[token : token + length] == theirs[place : place + length]
        assert len(theirs) >= place + length
        for i in range(token, token + length):
            covered[i] += 1
    assert max(covered, default=0) <= 1
