"""Records kept as differences: read as written, charged as held, never of something else."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Sequence

import pytest

from kvtc_vllm.tiers.blob_store import StoreError
from kvtc_vllm.tiers.delta_store import LARGEST_SHARE, LOST, DeltaStore, Prepared
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.tiers.memory import MemoryArena

US, THEM = b"us", b"them"


class Zlib:
    """Differences by a preset dictionary."""

    def encode(
        self,
        blob: bytes | bytearray | memoryview,
        sources: Sequence[bytes | bytearray | memoryview],
        runs: Sequence[tuple[int, int, int, int]],
        most: int,
    ) -> bytes | None:
        maker = zlib.compressobj(zdict=b"".join(map(bytes, sources)))
        made = maker.compress(bytes(blob)) + maker.flush()
        return made if len(made) <= most else None

    def decode(
        self,
        difference: bytes | bytearray | memoryview,
        sources: Sequence[bytes | bytearray | memoryview],
    ) -> bytes:
        return zlib.decompressobj(zdict=b"".join(map(bytes, sources))).decompress(difference)


def key(number: int) -> RecordKey:
    return RecordKey(bytes([number]) * 32)


def tokens(text: int) -> bytes:
    return array("i", random.Random(text).choices(range(50_000), k=128)).tobytes()


def blob(text: int, own: int) -> bytes:
    """Much of it follows from the text."""
    rng = random.Random(text)
    return rng.randbytes(400) + random.Random(own).randbytes(40)


def layer(capacity: int = 1 << 20) -> tuple[DeltaStore, MemoryArena]:
    inner = MemoryArena(capacity)
    return DeltaStore(inner, Zlib()), inner


def put(store: DeltaStore, number: int, text: int, tenant: bytes = US) -> int:
    made = blob(text, number)
    return store.write(key(number), store.prepare(key(number), made, tenant, tokens(text)), tenant)


def test_the_second_of_a_text_is_a_difference_within_a_tenant() -> None:
    store, inner = layer()
    whole = put(store, 1, text=0)
    assert whole == len(blob(0, 1))
    less = put(store, 2, text=0)
    assert less < LARGEST_SHARE * whole
    assert inner.used == whole + less
    for number in (1, 2):
        assert store.read(key(number)) == blob(0, number)
    assert put(store, 3, text=1) == whole
    assert put(store, 4, text=0, tenant=THEM) == whole
    assert put(store, 5, text=0, tenant=b"") == whole
    assert put(store, 6, text=0, tenant=b"") == whole
    # Of the first, not of the difference that is more recent.
    made = store.prepare(key(7), blob(0, 7), US, tokens(0))
    assert [name for name, _ in made.sources] == [key(1)]


def test_what_saves_little_is_kept_whole() -> None:
    store, _ = layer()
    put(store, 1, text=0)
    made = blob(9, 2)  # the tokens of text 0, but other contents
    new = store.prepare(key(2), made, US, tokens(0))
    assert new == Prepared(made, tokens(0))
    assert store.write(key(2), new, US) == len(made)


def test_a_blob_is_kept_whole_if_making_a_difference_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, inner = layer()
    put(store, 1, text=0)

    def fail(*_: object) -> bytes:
        raise KeyError("of some kind")

    monkeypatch.setattr(Zlib, "encode", fail)
    with caplog.at_level("WARNING", "vllm.kvtc"):
        assert put(store, 2, text=0) == len(blob(0, 2))
    assert "kept whole" in caplog.text
    assert inner.read(key(2)) == store.read(key(2)) == blob(0, 2)


def test_a_source_that_is_removed_stays_for_others_and_is_charged_to_them() -> None:
    store, inner = layer()
    whole = put(store, 1, text=0)
    first, second = (put(store, number, text=0) for number in (2, 3))
    assert store.remove([key(1)]) == 1
    assert store.take_resized() == [(key(2), first + whole)]
    assert store.keys() == [key(2), key(3)]
    with pytest.raises(StoreError, match="missing"):
        store.read(key(1))
    # Not found for new ones, which would keep it for ever.
    assert store.prepare(key(4), blob(0, 4), US, tokens(0)).difference is None
    assert store.remove([key(2)]) == 1
    assert store.take_resized() == [(key(3), second + whole)]
    assert store.read(key(3)) == blob(0, 3)
    assert put(store, 1, text=0) == whole  # computed again
    assert store.read(key(3)) == blob(0, 3)
    store.remove([key(3)])
    assert inner.used == whole
    assert store.take_resized() == []


def test_a_source_that_changed_before_the_write_is_not_used() -> None:
    store, _ = layer()
    whole = put(store, 1, text=0)
    for spoil in (
        lambda: store.remove([key(1)]),
        lambda: store.write(key(1), blob(5, 1), US),
        store.clear,
    ):
        put(store, 1, text=0)
        new = store.prepare(key(2), blob(0, 2), US, tokens(0))
        assert new.difference is not None
        spoil()
        assert store.write(key(2), new, US) == whole
        assert store.read(key(2)) == blob(0, 2)
        store.remove([key(2)])


def test_a_lost_or_altered_source_is_a_miss() -> None:
    """Below the layer, where nobody should take anything away."""
    store, inner = layer()
    put(store, 1, text=0)
    put(store, 2, text=0)
    kept = inner.read(key(1))
    inner.remove([key(1)])
    for spoilt in (None, kept[:-1], bytes(len(kept))):
        if spoilt is not None:
            inner.write(key(1), spoilt)
        with pytest.raises(StoreError) as caught:
            store.read(key(2))
        assert caught.value.reason == LOST
    inner.write(key(1), kept)
    assert store.read(key(2)) == blob(0, 2)


@pytest.mark.parametrize("lost", [1, 2], ids=["source", "difference"])
def test_what_is_lost_can_be_removed_and_written_again(lost: int) -> None:
    """As the scheduler does once a load has failed; a step must not fail for it."""
    store, inner = layer()
    put(store, 1, text=0)
    put(store, 2, text=0)
    put(store, 3, text=0)
    inner.remove([key(lost)])
    store.remove([key(1)])
    store.take_resized()
    with pytest.raises(StoreError):
        store.read(key(lost))
    put(store, 1, text=0)
    put(store, 2, text=0)
    assert [store.read(key(number)) for number in (1, 2)] == [blob(0, 1), blob(0, 2)]
    store.remove([key(number) for number in (1, 2, 3)])
    assert inner.used == 0
    assert store.keys() == []


def test_no_room_keeps_nothing() -> None:
    store, inner = layer(capacity=len(blob(0, 1)))
    put(store, 1, text=0)
    with pytest.raises(StoreError, match="full"):
        put(store, 2, text=0)
    assert store.keys() == [key(1)]
    store.remove([key(1)])
    assert inner.used == 0
    assert put(store, 2, text=0) == len(blob(0, 2))


def test_what_is_charged_is_what_is_held() -> None:
    """Any order of writes, rewrites and removals; sizes as the scheduler learns them."""
    rng = random.Random(0)
    store, inner = layer()
    charged: dict[RecordKey, int] = {}
    expected: dict[RecordKey, bytes] = {}
    differences = 0
    for _ in range(3000):
        number, text = rng.randrange(16), rng.randrange(3)
        name, tenant = key(number), rng.choice((US, THEM, b""))
        if rng.random() < 0.6:
            made = blob(text, number)
            new = store.prepare(name, made, tenant, tokens(text))
            differences += new.difference is not None
            charged[name] = store.write(name, new if rng.random() < 0.8 else made, tenant)
            expected[name] = made
        else:
            assert store.remove([name]) == (name in expected)
            charged.pop(name, None)
            expected.pop(name, None)
        charged.update(store.take_resized())
        assert sum(charged.values()) == inner.used
        assert {name: store.read(name) for name in expected} == expected
        assert set(store.keys()) == set(expected)
    assert differences > 300
    store.clear()
    assert inner.used == 0
    assert store.keys() == []
