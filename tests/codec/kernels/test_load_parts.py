"""Loads and stores that are cut: parts of a load share pinned memory, steps of a store are even."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.errors import ContainerError
from tests.codec.kernels import fake_nvcomp
from tests.codec.kernels.codecs import LATER, PAIRED
from tests.codec.kernels.paged_batches import STORES, TOKENS, encoded, filled, make
from tests.codec.kernels.paged_caches import read_slots
from tests.codec.kernels.requests import Load, Store

from kvtc_vllm.codec.kernels import blob_writer, paged_reader  # isort: skip
from kvtc_vllm.codec.kernels.chunks import even_steps  # isort: skip
from kvtc_vllm.codec.kernels.deflate_nvcomp import NvcompDeflate  # isort: skip
from kvtc_vllm.codec.kernels.load_parts import load_parts  # isort: skip
from kvtc_vllm.codec.kernels.payload_coding import StoredPayloads  # isort: skip
from kvtc_vllm.codec.kernels.unit_coders import NvcompUnitCoder  # isort: skip
from kvtc_vllm.codec.kernels.uploads import UploadedBlobs  # isort: skip
from kvtc_vllm.codec.kernels.verified import VerifiedBlob  # isort: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("side_stream"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="over a stand-in for nvCOMP"),
]
EACH = pytest.mark.parametrize(
    "artifact", ["kvtc", "kvtc2", pytest.param(PAIRED, marks=LATER)], indirect=True
)
SECOND = pytest.mark.parametrize("artifact", ["kvtc2"], indirect=True)
BLOCKS = torch.arange(64)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([], 8),
        ([3, 3, 2], 8),
        ([3, 3, 3], 8),
        ([1] * 9, 8),
        ([20, 1, 1], 8),
        ([1, 1, 20, 1, 30, 2], 8),
    ],
)
def test_neighbours_have_pinned_memory_of_their_own(sizes: list[int], most: int) -> None:
    parts = load_parts(sizes, most)
    assert [i for part in parts for i in range(len(sizes))[part.places]] == [*range(len(sizes))]
    assert len(parts) <= 1 or sum(sizes) > most
    taken = [(part.host, part.host + sum(sizes[part.places])) for part in parts]
    for (first, end), (other, last) in pairwise(taken):
        assert end <= other or last <= first
    if max(sizes, default=0) <= most // 2:
        assert all(end <= most for _, end in taken)


def test_even_steps_are_no_more_than_they_have_to_be() -> None:
    assert even_steps([1] * 64, 60) == [slice(0, 33), slice(33, 64)]
    assert even_steps([1] * 10, 10) == [slice(0, 10)]
    assert even_steps([], 10) == []
    assert even_steps([9, 9, 9], 10) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    for limit in (7, 10, 23):
        weights = [1 + i % 5 for i in range(40)]
        found = even_steps(weights, limit)
        assert all(sum(weights[part]) <= limit for part in found)
        assert [i for part in found for i in range(40)[part]] == [*range(40)]


def loads_of(blobs: list[Any]) -> list[tuple[Load, Any]]:
    return [(Load(s.start, s.block_ids, key=s.key), b) for b, s in zip(blobs, STORES, strict=True)]


@EACH
def test_parts_give_what_the_whole_gives(artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its half of the pinned memory, and the next is begun before one is decoded."""
    coder = NvcompUnitCoder(NvcompDeflate(fake_nvcomp.library()))
    whole, _ = make(artifact, "cpu", coder=coder)
    cut, _ = make(artifact, "cpu", coder=coder)
    filled(whole)
    blobs = encoded(whole)
    events: list[Any] = []
    made, decode = UploadedBlobs.__init__, type(cut)._load_part

    def noted(self: Any, views: Any, thread: Any, device: Any, there: bool, first: int) -> None:
        made(self, views, thread, device, there, first)
        events.append(("begun", first, first + self.on_device.numel()))

    def noted_part(self: Any, *args: Any) -> Any:
        events.append("decoded")
        return decode(self, *args)

    monkeypatch.setattr(UploadedBlobs, "__init__", noted)
    monkeypatch.setattr(type(cut), "_load_part", noted_part)
    assert whole.load(loads_of(blobs), TOKENS) == [None] * 3
    assert len(events) == 2
    events.clear()
    monkeypatch.setattr(paged_reader, "HOST_BYTES", 2 * min(map(len, blobs)))
    damaged = [blobs[0], bytes(len(blobs[1])), blobs[2]]
    errors = cut.load(loads_of(damaged), TOKENS)
    assert [error is None for error in errors] == [True, False, True]
    assert [event if event == "decoded" else "begun" for event in events] == [
        *["begun", "begun", "decoded"],
        *["begun", "decoded", "decoded"],
    ]
    (_, a, b), (_, c, d), (_, e, f) = (event for event in events if event != "decoded")
    assert b <= c or d <= a
    assert d <= e or f <= c
    assert cut.load(loads_of(blobs), TOKENS) == [None] * 3
    for mine, other in ((whole.cache.k, cut.cache.k), (whole.cache.v, cut.cache.v)):
        assert torch.equal(read_slots(mine, BLOCKS), read_slots(other, BLOCKS))
    assert cut.load([], TOKENS) == []


@EACH
def test_a_part_that_fails_leaves_nobody_writing(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, _ = make(artifact, "cpu")
    filled(codec)
    blobs = encoded(codec)
    checked: list[int] = []
    gate = threading.Event()

    def slow(blob: Any) -> bool:
        gate.wait(0.2)
        checked.append(1)
        return True

    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(paged_reader, "HOST_BYTES", 2 * min(map(len, blobs)))
    monkeypatch.setattr(paged_reader, "has_checksum", slow)
    monkeypatch.setattr(codec, "_check", fail)
    with pytest.raises(RuntimeError, match="kernel image"):
        codec.load(loads_of(blobs), TOKENS)
    assert len(checked) == 2, "the part that failed, and the next, which was begun"


@SECOND
def test_what_is_left_out_is_encoded_together(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that find no room take few steps more, not one each."""
    codec, _ = make(artifact, "cpu")
    filled(codec)
    seven = [*STORES, *STORES, STORES[0]]
    stores = [Store(s.block_ids, TOKENS * (1 + i), s.key) for i, s in enumerate(seven)]
    wanted = codec.encode_staged(codec.stage(stores))
    steps: list[int] = []
    encode = codec.coding.encode

    def half(layout: Any, rows: Any, marks: Any) -> Any:
        """Room for every second chunk of a step."""
        count = len(layout.members)
        steps.append(count)
        own = [*range(0, count, 2)]
        ends = layout.first_rows
        part = layout.chosen(own)
        found = encode(part, torch.cat([rows[ends[i] : ends[i + 1]] for i in own]), marks)
        return replace(found, left_out=tuple(range(1, count, 2)))

    monkeypatch.setattr(codec.coding, "encode", half)
    assert codec.encode_staged(codec.stage(stores)) == wanted
    assert steps == [7, 3, 1]


@EACH
def test_blobs_are_written_while_the_next_step_is_encoded(
    artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, _ = make(artifact, "cpu", workspace_bytes=1)
    filled(codec)
    wanted = encoded(codec)
    encode = codec.coding.encode
    seen: list[bool] = []
    writing = threading.Event()
    go_on = threading.Event()
    checksum = blob_writer.checksum

    def slow(data: Any) -> bytes:
        writing.set()
        go_on.wait(5)
        return checksum(data)

    def noted(*args: Any) -> Any:
        if seen:
            # The first step's blob waits for this one.
            seen.append(writing.wait(5))
            go_on.set()
        seen.append(True)
        return encode(*args)

    monkeypatch.setattr(blob_writer, "checksum", slow)
    monkeypatch.setattr(codec.coding, "encode", noted)
    assert encoded(codec) == wanted
    assert len(seen) == 5
    assert all(seen)


@SECOND
def test_many_blobs_are_looked_at_as_each_alone(artifact: Any) -> None:
    codec, _ = make(artifact, "cpu")
    filled(codec)
    blobs = encoded(codec)
    verified = [VerifiedBlob.of(b, codec._verified(b, s.start, TOKENS, s.key)) for b, s in
                zip(blobs, STORES, strict=True)]  # fmt: skip
    coded = [TOKENS - blob.sinks for blob in verified]
    alone = [codec.coding.stored(b, n) for b, n in zip(verified, coded, strict=True)]
    together = codec.coding.stored_in(verified, coded)
    for own, other in zip(alone, together, strict=True):
        assert isinstance(other, StoredPayloads)
        assert own.first == other.first
        assert np.array_equal(own.lengths, other.lengths)
        assert np.array_equal(own.marks, other.marks)
    # A padding bit of the marks of the last one is set, the others are as they were.
    bad = bytearray(blobs[-1])
    place = verified[-1].tables.body
    bad[place] ^= 0xFF
    verified[-1] = VerifiedBlob(memoryview(bad), verified[-1].sinks, verified[-1].tables)
    *fine, error = codec.coding.stored_in(verified, coded)
    assert all(isinstance(found, StoredPayloads) for found in fine)
    with pytest.raises(ContainerError) as caught:
        codec.coding.stored(verified[-1], coded[-1])
    assert isinstance(error, ContainerError)
    assert str(error) == str(caught.value)
