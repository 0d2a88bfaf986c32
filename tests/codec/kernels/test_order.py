"""In which order a load uses the device: it writes late, and never after it has failed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.kvtc import KvtcCodec
from tests.codec.kernels.devices import DEVICES
from tests.codec.kernels.paged_caches import paged_cache
from tests.codec.kernels.requests import Load
from tests.codec.synthetic import SyntheticModel

from kvtc_vllm.codec.kernels import bit_payloads, decoder, paged_reader, uploads  # isort: skip
from kvtc_vllm.codec.kernels.paged_codec import PagedKvtcCodec  # isort: skip
from kvtc_vllm.codec.kernels.verified import has_checksum  # isort: skip

MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=1, head_size=4, head_size_v=4, layer_groups=((0, 1), (1, 2))
)
TOKENS = 8


class Log:
    """Stands for the event of the running step, and for the side stream that inflates."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def wait(self) -> None:
        self.entries.append("wait for the step")

    def synchronize(self) -> None:
        self.entries.append("wait for the side stream")

    def noting(self, name: str, call: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            self.entries.append(name)
            return call(*args, **options)

        return noted


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    for module, name in (
        (bit_payloads, "decode_payloads"),
        (bit_payloads, "products"),
        (decoder, "scatter_rows"),
        (paged_reader, "scatter_rows"),
    ):
        monkeypatch.setattr(module, name, log.noting(name, getattr(module, name)))
    return log


@pytest.fixture(scope="module")
def artifact() -> Any:
    return MODEL.artifact((8.0,), fit_rows=256)


def make(artifact: Any, device: str) -> tuple[PagedKvtcCodec, list[tuple[Load, bytes]]]:
    cache = paged_cache("NHD", 2, 16, 1, 4, 4, 4, torch.bfloat16, device)
    codec = PagedKvtcCodec(artifact, 8.0, cache, 4)
    reference = KvtcCodec(artifact, 8.0, torch.bfloat16)
    return codec, [
        (Load(start, [2 + start // 4, 3 + start // 4]), reference.encode(k, v, start))
        for start in (0, TOKENS)
        for k, v in [MODEL.chunk(TOKENS, start, 3)]
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_only_writing_waits_for_the_running_step(artifact: Any, device: str, log: Log) -> None:
    codec, loads = make(artifact, device)
    assert codec.load(loads, TOKENS, log) == [None, None]  # type: ignore[arg-type]
    assert log.entries[:2] == ["decode_payloads", "products"]
    writes = [i for i, entry in enumerate(log.entries) if entry == "scatter_rows"]
    assert len(writes) == 2
    assert all(log.entries[i - 1] == "wait for the step" for i in writes)
    # All of the step is computed before. The sinks come last: they would make all the rest wait.
    assert log.entries[-1] == "scatter_rows"
    assert {"decode_payloads", "products"}.isdisjoint(log.entries[writes[0] :])


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_inflates_while_tables_of_the_step_are_made(
    artifact: Any, device: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, loads = make(artifact, device)
    inflate = log.noting("inflate", type(codec._units).open)
    monkeypatch.setattr(type(codec._units), "open", inflate)
    monkeypatch.setattr(paged_reader, "upload", log.noting("upload", paged_reader.upload))
    assert codec.load(loads, TOKENS) == [None, None]
    assert log.entries[:3] == ["inflate", "upload", "decode_payloads"]


@pytest.mark.parametrize("device", DEVICES)
def test_heads_are_looked_at_while_checksums_are(
    artifact: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, loads = make(artifact, device)
    looked = threading.Event()
    in_time: list[bool] = []
    match = paged_reader.ExpectedHead.match

    def noted(*args: Any) -> Any:
        looked.set()
        return match(*args)

    def late(blob: Any) -> bool:
        in_time.append(looked.wait(5))
        return has_checksum(blob)

    monkeypatch.setattr(paged_reader.ExpectedHead, "match", noted)
    monkeypatch.setattr(paged_reader, "has_checksum", late)
    assert codec.load(loads, TOKENS) == [None, None]
    assert in_time == [True, True]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_is_taken_before_anything_is_launched(
    artifact: Any, device: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, loads = make(artifact, device)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(decoder.DecodeWorkspace, "of", full)
    with pytest.raises(torch.OutOfMemoryError):
        codec.load(loads, TOKENS, log)  # type: ignore[arg-type]
    assert log.entries == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stage", ["decode_payloads", "scatter_rows"])
def test_a_failed_load_ends_the_stream_that_inflates(
    artifact: Any, device: str, log: Log, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Its buffers go back to the memory of another stream."""
    codec, loads = make(artifact, device)
    mine = codec._own.mine
    monkeypatch.setattr(mine.stream, "synchronize", log.synchronize)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image is available")

    module = decoder if stage == "scatter_rows" else bit_payloads
    monkeypatch.setattr(module, stage, fail)
    with pytest.raises(RuntimeError, match="kernel image"):
        codec.load(loads, TOKENS, log)  # type: ignore[arg-type]
    assert log.entries[-1] == "wait for the side stream"


@pytest.mark.parametrize("device", DEVICES)
def test_sinks_cross_pinned_memory(
    artifact: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from ordinary memory would keep the thread until the stream has caught up."""
    codec, loads = make(artifact, device)
    seen: list[tuple[int, ...]] = []
    upload = paged_reader.upload

    def noted(x: torch.Tensor, to: torch.device) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return upload(x, to)

    monkeypatch.setattr(paged_reader, "upload", noted)
    decoded: list[torch.device] = []
    decode = codec._decode_sinks
    monkeypatch.setattr(
        codec, "_decode_sinks", lambda *args: (decoded.append(args[2]), decode(*args))[1]
    )
    assert codec.load(loads, TOKENS) == [None, None]
    assert decoded == [torch.device("cpu")]
    assert seen.count((4, 2 * 2 * 4)) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_load_leaves_nobody_writing_into_memory_of_the_next(
    artifact: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, loads = make(artifact, device)
    many = loads * 6
    checked: list[int] = []

    def slow(blob: Any) -> bool:
        time.sleep(0.01)
        checked.append(1)
        return has_checksum(blob)

    def fail(*args: Any) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(paged_reader, "has_checksum", slow)
    monkeypatch.setattr(codec, "_check", fail)
    with pytest.raises(RuntimeError, match="kernel image"):
        codec.load(many, TOKENS)
    assert len(checked) == len(many)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_decoded_is_not_sent(
    artifact: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would wait for the copy."""
    codec, loads = make(artifact, device)
    sent: list[slice] = []
    send = uploads.UploadedBlobs.send

    def noted(self: Any, blobs: slice) -> None:
        sent.append(blobs)
        send(self, blobs)

    monkeypatch.setattr(uploads.UploadedBlobs, "send", noted)
    monkeypatch.setattr(paged_reader, "FIRST_WAVE", TOKENS)
    monkeypatch.setattr(paged_reader, "LARGEST_WAVE", TOKENS)
    monkeypatch.setattr(type(codec._units), "reads_on_device", True)
    (load, blob), second = loads
    damaged = bytes([blob[0] ^ 1]) + blob[1:]
    first, other = codec.load([(load, damaged), second], TOKENS)
    assert first is not None
    assert first.reason == "magic"
    assert other is None
    assert sent == [slice(1, 2)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_changes_on_its_way_to_the_device_is_not_decoded(
    artifact: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksum is of what is sent, not of what it was copied from."""
    codec, loads = make(artifact, device)
    stage = uploads.UploadedBlobs.stage

    def worn(self: Any, index: int) -> memoryview:
        staged = stage(self, index)
        if index == 1:
            first = self.starts[index]
            self.staged[first + len(self.views[index]) // 2] ^= 1
        return staged

    monkeypatch.setattr(uploads.UploadedBlobs, "stage", worn)
    monkeypatch.setattr(type(codec._units), "reads_on_device", True)
    first, other = codec.load(loads, TOKENS)
    assert first is None
    assert other is not None
    assert other.reason == "checksum"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("left", "reason"), [(0, "truncated"), (20, "truncated"), (-5, "checksum")]
)
def test_what_is_too_short_fails_alone_where_it_is_staged(
    artifact: Any, device: str, left: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, ((load, blob), second) = make(artifact, device)
    monkeypatch.setattr(type(codec._units), "reads_on_device", True)
    first, other = codec.load([(load, blob[:left]), second], TOKENS)
    assert first is not None
    assert first.reason == reason
    assert other is None
