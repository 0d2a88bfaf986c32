"""Side streams end before what they used is given back; small uploads reuse pinned memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kvtc_vllm.codec import streams
from kvtc_vllm.codec.streams import DeviceThreads, SideStream, UploadRing
from tests.codec.kernels.fake_cuda import CUDA, FakeCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("way", ["after", "to_end"])
def test_what_a_failed_block_launched_has_run_when_it_is_left(cuda: FakeCuda, way: str) -> None:
    stream = SideStream(CUDA)

    def run_out_of_memory() -> None:
        with getattr(stream, way)():
            cuda.launch("work")
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        run_out_of_memory()
    assert [what for _, what in cuda.log][:2] == ["work", "synchronize"]
    assert cuda.log[0][0] == cuda.log[1][0] != "default"


def test_only_to_end_waits_after_a_good_block(cuda: FakeCuda) -> None:
    stream = SideStream(CUDA)
    with stream.after():
        cuda.launch("work")
    assert [what for _, what in cuda.log] == ["work"]
    with stream.to_end():
        cuda.launch("more")
    assert [what for _, what in cuda.log] == ["work", "more", "synchronize"]


def test_each_thread_has_a_stream_of_its_own(cuda: FakeCuda) -> None:
    own = DeviceThreads(CUDA)
    found = [own.mine.stream, own.mine.stream]
    thread = threading.Thread(target=lambda: found.append(own.mine.stream))
    thread.start()
    thread.join()
    assert found[0] is found[1] is not found[2]


class CountedEvent:
    """A copy that is waited for is noted."""

    waited: list[int]
    made = 0

    def __init__(self, device: torch.device) -> None:
        type(self).made += 1
        self.number = self.made

    def synchronize(self) -> None:
        self.waited.append(self.number)


def test_a_place_is_used_again_when_the_copy_out_of_it_has_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "Event", CountedEvent)
    CountedEvent.waited, CountedEvent.made = [], 0
    ring = UploadRing(torch.device("cpu"), 256)
    tensors = [torch.arange(8) + 100 * i for i in range(7)]
    copies = [ring.put(x) for x in tensors]
    assert all(torch.equal(a, b) for a, b in zip(copies, tensors, strict=True))
    # 64 bytes each: four fill the ring, the fifth takes the place of the first.
    assert CountedEvent.waited == [1, 2, 3]
    odd = torch.tensor([1.5, -2.0, 3.0], dtype=torch.float16)
    assert torch.equal(ring.put(odd.view(3, 1)), odd.view(3, 1))
    # numpy gives an empty selection strides of 0, which no view as bytes takes.
    none = torch.from_numpy(np.arange(6).reshape(2, 3)[np.zeros((2, 3), bool)])
    assert ring.put(none).shape == (0,)
    assert ring.put(none).dtype == torch.int64
