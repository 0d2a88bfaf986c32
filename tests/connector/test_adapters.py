"""LoRA adapters by what was loaded: digests in workers, names in the scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtc_vllm.connector.adapters import GONE, AdapterDigests, LoadedAdapters, adapter_id
from kvtc_vllm.connector.messages import WorkerReport
from tests.connector.fakes import (
    BLOCK,
    FakeBlockPool,
    FakeLora,
    FakeOutput,
    FakeRequest,
    confirm,
    scheduler,
    start,
    step,
)

ONE, TWO = b"1" * 16, b"2" * 16


def weights(value: float, rank: int = 2, scaling: Any = 1) -> Any:
    a, b = torch.full((rank, 8), value), torch.full((8, rank), value)
    return SimpleNamespace(rank=rank, scaling=scaling, lora_a=a, lora_b=b)


class Adapter(SimpleNamespace):
    """As vLLM's `LoRAModel`: layer name -> weights."""


class Manager:
    """vLLM's keeper of adapters: `files` stands for the disk."""

    def __init__(self) -> None:
        self.files: dict[int, float] = {}
        self.registered: dict[int, Adapter] = {}
        self._adapter_manager = SimpleNamespace(list_adapters=lambda: dict(self.registered))

    def list_adapters(self) -> set[int]:
        return set(self.registered)

    def add_adapter(self, request: FakeLora) -> None:
        number = request.lora_int_id
        if number not in self.files:
            raise FileNotFoundError(request.lora_path)
        self.registered[number] = Adapter(loras={"q_proj": weights(self.files[number])})


def loaded(manager: Manager, number: int = 1, value: float = 1.0, **fields: Any) -> LoadedAdapters:
    manager.files[number] = value
    adapters = LoadedAdapters(manager)
    adapters.load([FakeLora(number, **fields)])
    return adapters


def digest_of(parts: dict[str, Any]) -> bytes | None:
    manager = Manager()
    manager.registered[1] = Adapter(loras=parts)
    return LoadedAdapters(manager).refresh()[1]


def test_a_digest_is_of_the_contents_and_of_all_of_them() -> None:
    half = [weights(1).lora_a, None]
    others = [
        {"q_proj": weights(1)},
        {"q_proj": weights(2)},
        {"k_proj": weights(1)},
        {"q_proj": weights(1, rank=4)},
        {"q_proj": weights(1, scaling=2)},
        {"q_proj": weights(1), "k_proj": weights(1)},
        {"qkv": SimpleNamespace(rank=2, scaling=[1, 1], lora_a=half, lora_b=half)},
        {"qkv": SimpleNamespace(rank=2, scaling=[1, 1], lora_a=half[::-1], lora_b=half[::-1])},
    ]
    digests = [digest_of(parts) for parts in others]
    assert len({*digests}) == len(others)
    assert None not in digests
    assert digest_of({"q_proj": weights(1)}) == digests[0]
    bfloat = weights(1)
    bfloat.lora_a = bfloat.lora_a.bfloat16()
    assert digest_of({"q_proj": bfloat}) != digests[0]


def test_an_adapter_of_a_kind_that_we_do_not_know_has_no_digest() -> None:
    assert digest_of({"lm_head": SimpleNamespace(rank=1, scaling=1)}) is None


def test_news_come_once_and_again_when_another_object_stands_for_an_adapter() -> None:
    manager = Manager()
    manager.files[1] = 1.0
    adapters = LoadedAdapters(manager)
    assert adapters.refresh() == {}
    first = adapters.load([FakeLora()])[1]
    assert first
    assert adapters.is_loaded(1, first)
    assert adapters.refresh() == {}
    manager.files[1] = 2.0  # new files; what is loaded is still the old adapter
    assert adapters.load([FakeLora()]) == {1: first}
    manager.add_adapter(FakeLora())  # loaded in place
    second = adapters.refresh()[1]
    assert second
    assert second != first
    assert not adapters.is_loaded(1, first)
    del manager.registered[1]
    assert adapters.refresh() == {1: GONE}
    assert not adapters.is_loaded(1, second)


def test_an_adapter_that_is_loaded_again_for_every_step_is_read_when_asked() -> None:
    manager = Manager()
    adapters = loaded(manager, load_inplace=True)
    before = adapters.load([FakeLora()])[1]
    manager.files[1] = 2.0
    assert adapters.load([FakeLora(load_inplace=True)])[1] != before


def test_an_adapter_that_cannot_be_loaded_has_no_name() -> None:
    assert LoadedAdapters(Manager()).load([FakeLora()]) == {1: None}
    assert LoadedAdapters(None).load([FakeLora()]) == {1: None}
    assert LoadedAdapters(None).refresh() == {}


def test_ranks_that_read_different_files_have_no_common_name() -> None:
    joined = WorkerReport(0, adapters={1: ONE, 2: ONE})
    joined.aggregate(WorkerReport(0, adapters={1: TWO, 2: ONE, 3: TWO}))
    assert joined.adapters == {1: None, 2: ONE, 3: TWO}


def test_the_scheduler_asks_once_and_remembers_until_it_is_gone() -> None:
    digests = AdapterDigests()
    request = with_adapter(FakeRequest("r", 128))
    assert digests.of(FakeRequest("plain", 128)) == b""
    assert digests.of(request) is digests.of(request) is None
    assert digests.take_wanted() == [request.lora_request]
    assert digests.take_wanted() == []
    assert digests.report(1, ONE) is False
    assert digests.of(request) == ONE
    assert digests.report(1, GONE) is False
    assert digests.of(request) is None
    assert digests.report(1, TWO) is True  # others than the last that was seen


def test_the_digest_of_an_adapter_in_place_is_asked_for_every_request() -> None:
    digests = AdapterDigests()
    request = with_adapter(FakeRequest("r", 128), load_inplace=True)
    digests.report(1, ONE)
    assert digests.of(request) is None
    assert len(digests.take_wanted()) == 1


# ------------------------------------------------------------- in the scheduler's side


def with_adapter(request: FakeRequest, **fields: Any) -> Any:
    request.lora_request = FakeLora(**fields)  # type: ignore[attr-defined]
    return request


def tell(side: Any, number: int, digest: bytes | None, at: int = 0) -> None:
    """Workers told what an adapter contains, in a step."""
    side.apply_report(WorkerReport(side._epoch, adapters={number: digest}, step=at), None)


def stored(side: Any, name: str, tokens: int = 257) -> list[bytes]:
    request = with_adapter(FakeRequest(name, tokens))
    metadata = start(side, request, list(range(-(-tokens // BLOCK))), tokens)
    confirm(side, metadata)
    side.finish(request)
    side.plan_step(FakeOutput(finished_req_ids={name}))
    return [item.key for item in metadata.stores]


def test_a_request_waits_until_its_adapter_is_known() -> None:
    side = scheduler(recent_window=0)
    request = with_adapter(FakeRequest("r", 257))
    assert side.match(request, 0) is None
    assert side.plan_step(FakeOutput()).adapters == [request.lora_request]
    assert side.plan_step(FakeOutput()).adapters == []
    tell(side, 1, ONE)
    assert side.match(request, 0) == 0
    assert adapter_id(request) == 1
    assert stored(side, "again") == [b"a:3" + ONE, b"a:7" + ONE]
    assert side.match(with_adapter(FakeRequest("third", 257)), 0) == 256


def test_an_adapter_that_nobody_can_tell_is_never_kept_nor_waited_for() -> None:
    side = scheduler(recent_window=0)
    assert side.match(with_adapter(FakeRequest("r", 257)), 0) is None
    tell(side, 1, None)
    request = with_adapter(FakeRequest("r", 257))
    assert side.match(request, 0) == 0
    assert start(side, request, list(range(9)), 257).stores == []
    stats = side.take_stats()
    assert stats is not None
    assert stats.data["bypassed_tokens"] == 257


def test_other_contents_are_another_name() -> None:
    side = scheduler(recent_window=0)
    tell(side, 1, ONE)
    stored(side, "r")
    tell(side, 1, TWO, at=2)
    assert side.match(with_adapter(FakeRequest("again", 257)), 0) == 0
    assert side.match(FakeRequest("plain", 257), 0) == 0
    tell(side, 1, ONE, at=3)  # the old one was loaded again
    assert side.match(with_adapter(FakeRequest("third", 257)), 0) == 256


def test_what_runs_while_its_adapter_changes_is_not_stored_any_more() -> None:
    side = scheduler(recent_window=0)
    tell(side, 1, ONE)
    request = with_adapter(FakeRequest("r", 300))
    plain = FakeRequest("p", 300, name="b")
    for one in (request, plain):
        side.match(one, 0)
        start(side, one, list(range(10)), 100)
    tell(side, 1, TWO, at=3)
    assert step(side, request, 200).stores == []
    assert len(step(side, plain, 200).stores) == 2


@pytest.mark.parametrize("reset", [False, True])
def test_on_blocks_of_an_adapter_that_was_replaced_nothing_is_stored(reset: bool) -> None:
    """vLLM's own cache knows the adapter's name only."""
    side, pool = scheduler(recent_window=0), FakeBlockPool()
    side.bind_gpu_blocks(pool)
    tell(side, 1, ONE)
    stored(side, "r")
    tell(side, 1, TWO, at=2)
    if reset:
        pool.reset()
    request = with_adapter(FakeRequest("again", 300))
    metadata = start(side, request, list(range(10)), 300 - 128, local=128)
    assert [item.key for item in metadata.stores] == ([b"a:3" + TWO, b"a:7" + TWO] if reset else [])
    plain = FakeRequest("plain", 300)
    assert len(start(side, plain, list(range(10)), 300 - 128, local=128).stores) == 2
