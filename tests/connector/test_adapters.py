"""LoRA adapters by what was loaded: digests in workers, names in the scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtc_vllm.offload.adapters import GONE, AdapterDigests, LoadedAdapters, adapter_id
from kvtc_vllm.offload.messages import NO_ADAPTER, AdapterUse, WorkerReport
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
NAME_ONE, NAME_TWO = AdapterUse(1, (ONE,)).digest, AdapterUse(1, (TWO,)).digest


class Adapter:
    """As vLLM's `LoRAModel`: weights in host memory, of which slots hold copies."""

    def __init__(self, value: float) -> None:
        self.value = value


class Layer:
    """As vLLM's LoRA layers: tensors [slots, ...], one set or several."""

    def __init__(self, slots: int) -> None:
        self.lora_a_stacked = (torch.zeros(slots, 1, 4, 8), torch.zeros(slots, 1, 4, 8))
        self.w2_lora_b_stacked = torch.zeros(slots, 1, 8, 4)
        self.other = torch.zeros(3)

    def fill(self, slot: int, value: float) -> None:
        self.lora_a_stacked[0][slot] = value
        self.lora_a_stacked[1][slot] = -value
        self.w2_lora_b_stacked[slot] = 2 * value


class Manager:
    """vLLM's keeper of adapters, with as many slots; `files` stands for the disk."""

    def __init__(self, slots: int = 2, layers: int = 2) -> None:
        self.files: dict[int, float] = {}
        self.registered: dict[int, Adapter] = {}
        self.lora_index_to_id: list[int | None] = [None] * slots
        layer = Layer(slots)
        self.modules = {"a": layer, "same": layer, **{str(n): Layer(slots) for n in range(layers)}}
        self._adapter_manager = self

    def list_adapters(self) -> dict[int, Adapter]:
        return dict(self.registered)

    def add_adapter(self, request: FakeLora) -> None:
        number = request.lora_int_id
        if number not in self.files:
            raise FileNotFoundError(request.lora_path)
        if number not in self.registered or request.load_inplace:
            self.registered[number] = Adapter(self.files[number])
            self.deactivate(number)
        self.activate(number)

    def activate(self, number: int) -> None:
        if number not in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(None)
            self.lora_index_to_id[slot] = number
            for layer in self.modules.values():
                layer.fill(slot, self.registered[number].value)

    def deactivate(self, number: int) -> None:
        if number in self.lora_index_to_id:
            self.lora_index_to_id[self.lora_index_to_id.index(number)] = None


def loaded(manager: Manager, number: int = 1, value: float = 1.0) -> bytes:
    """The digest of an adapter that was just loaded."""
    manager.files[number] = value
    digest = LoadedAdapters(manager).load([FakeLora(number)])[number]
    assert digest
    return digest


def test_a_digest_is_of_what_computes_and_of_nothing_else() -> None:
    assert loaded(Manager(), 1) == loaded(Manager(), 2) == loaded(Manager(slots=4))
    assert loaded(Manager(), value=2.0) != loaded(Manager())
    assert loaded(Manager(layers=3)) != loaded(Manager())
    busy = Manager()
    loaded(busy, 7, 3.0)
    assert loaded(busy) == loaded(Manager())  # in another slot
    for part in range(3):
        manager = Manager()
        loaded(manager)
        layer = manager.modules["1"]
        (*layer.lora_a_stacked, layer.w2_lora_b_stacked)[part][0, 0, 3, 3] = 9
        assert LoadedAdapters(manager).refresh()[1] != loaded(Manager())


def test_layers_of_a_kind_that_we_do_not_know_give_no_digest() -> None:
    manager = Manager()
    manager.modules = {"lm_head": SimpleNamespace(weights=torch.zeros(2, 2))}  # type: ignore[dict-item]
    manager.registered[1], manager.lora_index_to_id[0] = Adapter(1.0), 1
    assert LoadedAdapters(manager).refresh() == {1: None}


def test_news_come_once_and_again_when_an_adapter_is_loaded_again() -> None:
    manager = Manager()
    manager.files[1] = 1.0
    adapters = LoadedAdapters(manager)
    assert adapters.refresh() == {}
    first = adapters.load([FakeLora()])[1]
    assert first
    assert adapters.is_loaded(1, first)
    assert adapters.sample(1).matches()
    assert adapters.refresh() == {}
    manager.files[1] = 2.0  # new files; what is loaded is still the old adapter
    assert adapters.load([FakeLora()]) == {1: first}
    manager.add_adapter(FakeLora(load_inplace=True))
    second = adapters.refresh()[1]
    assert second
    assert second != first
    assert not adapters.is_loaded(1, first)
    manager.deactivate(1)
    assert adapters.refresh() == {1: GONE}
    assert not adapters.is_loaded(1, second)
    assert not adapters.sample(1).matches()


def test_a_copy_in_host_memory_that_follows_its_file_is_not_believed() -> None:
    """The slot computes with what was there when it was filled."""
    manager = Manager()
    first = loaded(manager)
    adapters = LoadedAdapters(manager)
    manager.registered[1].value = 2.0  # the mapped file was overwritten
    assert adapters.refresh() == {1: first}
    manager.deactivate(1)
    manager.activate(1)  # into the same slot, between two looks
    assert adapters.refresh() == {}
    assert not adapters.sample(1).matches()
    adapters.forget()
    assert adapters.refresh()[1] not in (first, GONE, None)


def test_an_adapter_that_is_loaded_again_for_every_step_is_read_when_asked() -> None:
    manager = Manager()
    before = loaded(manager)
    manager.files[1] = 2.0
    assert LoadedAdapters(manager).load([FakeLora(load_inplace=True)])[1] != before


def test_an_adapter_that_cannot_be_loaded_has_no_name() -> None:
    assert LoadedAdapters(Manager()).load([FakeLora()]) == {1: None}
    assert LoadedAdapters(None).load([FakeLora()]) == {1: None}
    assert LoadedAdapters(None).refresh() == {}


def test_an_adapter_is_known_when_all_ranks_have_told() -> None:
    joined = WorkerReport(0, adapters={1: {0: ONE}, 2: {0: ONE}})
    joined.aggregate(WorkerReport(0, adapters={1: {1: TWO}, 3: {1: TWO}}))
    assert joined.adapters == {1: {0: ONE, 1: TWO}, 2: {0: ONE}, 3: {1: TWO}}
    digests = AdapterDigests(2)
    digests.report(1, {1: TWO})
    assert digests.known(1) is None
    digests.report(1, {0: ONE})
    assert digests.known(1) == AdapterUse(1, (ONE, TWO))
    assert digests.report(1, {1: ONE}) is True
    digests.report(1, {0: None})
    assert digests.known(1) is None
    assert digests.is_nameless(1)


def test_the_scheduler_asks_once_and_remembers_until_it_is_gone() -> None:
    digests = AdapterDigests(1)
    request = with_adapter(FakeRequest("r", 128))
    assert digests.of(FakeRequest("plain", 128)) == NO_ADAPTER
    assert digests.of(request) is digests.of(request) is None
    assert digests.take_wanted() == [request.lora_request]
    assert digests.take_wanted() == []
    assert digests.report(1, {0: ONE}) is False
    assert digests.of(request) == AdapterUse(1, (ONE,))
    assert digests.report(1, {0: GONE}) is False
    assert digests.of(request) is None
    assert digests.report(1, {0: TWO}) is True  # others than the last that was seen


def test_the_digest_of_an_adapter_in_place_is_asked_for_every_request() -> None:
    digests = AdapterDigests(1)
    request = with_adapter(FakeRequest("r", 128), load_inplace=True)
    digests.report(1, {0: ONE})
    assert digests.of(request) is None
    assert len(digests.take_wanted()) == 1


# ------------------------------------------------------------- in the scheduler's side


def with_adapter(request: FakeRequest, **fields: Any) -> Any:
    request.lora_request = FakeLora(**fields)  # type: ignore[attr-defined]
    return request


def tell(side: Any, number: int, digest: bytes | None, at: int = 0) -> None:
    """Workers told what an adapter contains, in a step."""
    news = {number: {0: digest}}
    side.apply_report(WorkerReport(side._epoch, adapters=news, step=at), None)


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
    assert stored(side, "again") == [b"a:3" + NAME_ONE, b"a:7" + NAME_ONE]
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
    assert [item.key for item in metadata.stores] == (
        [b"a:3" + NAME_TWO, b"a:7" + NAME_TWO] if reset else []
    )
    plain = FakeRequest("plain", 300)
    assert len(start(side, plain, list(range(10)), 300 - 128, local=128).stores) == 2
