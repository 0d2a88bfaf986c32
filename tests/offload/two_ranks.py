"""Two ranks that share one copy, or not, and their scheduler: threads stand for processes."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.torch_transfer import TorchTransfer
from kvtc_vllm.offload.disk_worker import DiskWorker
from kvtc_vllm.offload.geometry import codec_geometry
from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.names import Names
from kvtc_vllm.offload.namespace import open_in_time
from kvtc_vllm.offload.scheduler import KVTCScheduler
from kvtc_vllm.offload.weights import WeightsWatch
from kvtc_vllm.offload.worker import KVTCWorker
from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.shared_arena import SharedArena, SharedView
from kvtc_vllm.vllm_cache.layout import PagedLayout
from tests.connector.fakes import BLOCK, FakeOutput, FakeRequest, geometry, start

SHAPE = geometry(tp_size=2, head_size=64)
GROUP = SHAPE.only_group
BLOCKS = 4
"""Of a chunk."""
CHUNK = BLOCKS * BLOCK
RAW_BYTES = CHUNK * GROUP.token_bytes
BOUND = RAW_BYTES + 4096
PATIENCE = 20.0

Result = TypeVar("Result")


class Meeting:
    """`Gather` of two threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=PATIENCE)
        self._parts: list[Any] = [None, None]

    def __call__(self, rank: int, value: Any) -> Sequence[Any]:
        self._parts[rank] = value
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()  # before anybody overwrites them
        return parts


def at_once(call: Callable[[int], Any]) -> list[Any]:
    """Call a function on two ranks at once; gives what each returned or raised."""
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(call, rank) for rank in range(2)]
        return [one.exception() or one.result() for one in running]


class Rank:
    """Rank 0 keeps, rank 1 reads; or each keeps, where there is no arena of both. Each has weights
    and pages of its own."""

    def __init__(
        self,
        number: int,
        meeting: Meeting,
        arena: SharedArena | None,
        config: Any,
        root: Path | None,
    ) -> None:
        generator = torch.Generator().manual_seed(number)
        self.caches = {
            name: torch.randn(64, 2, BLOCK, 128, generator=generator).to(torch.bfloat16)
            for name in GROUP.layer_names
        }
        self.model = nn.Linear(64, 64)
        with torch.no_grad():
            self.model.weight.copy_(torch.randn(64, 64, generator=generator))
            self.model.bias.fill_(number)
        self.codec = RawCodec(codec_geometry(GROUP), torch.bfloat16)
        layout = PagedLayout(self.caches, GROUP)
        keeps = number == 0 or arena is None
        self.names = Names(
            [self.codec],
            weights=WeightsWatch([self.model]),
            open_store=partial(_open_store, root) if root is not None and keeps else None,
            gather=partial(meeting, number),
            one_name=arena is not None,
        )
        self.disk: DiskWorker | None = None
        self.make = lambda: KVTCWorker(
            config,
            SHAPE,
            [TorchTransfer(layout, self.codec, CHUNK)],
            layout.device,
            1 << 24,
            number,
            self.names,
            self.disk,
            memory=arena if number == 0 else None,
            view=SharedView(os.dup(arena.fd), arena.capacity)
            if arena is not None and number
            else None,
        )

    def begin(self) -> None:
        self.names.rename(b"")
        namespace = self.names.namespace(b"")
        if namespace is not None:
            open_in_time(namespace)
            self.disk = DiskWorker(namespace, 1, 5.0, 1 << 24)
        self.worker = self.make()

    def turn(self, step: StepMetadata) -> tuple[set[str], set[int], WorkerReport | None]:
        self.worker.before_forward(step)
        self.worker.begin_step(step)
        self.worker.store(step)
        finished = self.worker.poll(step.idle)
        return finished, self.worker.take_bad_blocks(), self.worker.take_report()

    def page(self, block: int) -> torch.Tensor:
        return torch.stack([cache[block] for cache in self.caches.values()])


def _open_store(root: Path, identity: bytes, generation: bytes) -> DiskStore:
    return DiskStore(root, identity, capacity=1 << 26, min_free=0, most_bytes=1 << 22)


class TwoRanks:
    """An engine in small. room: of memory, in chunks. one_copy: else each rank has its own."""

    def __init__(
        self, root: Path | None = None, room: int = 16, one_copy: bool = True, **extra: Any
    ) -> None:
        self.root = root
        disk = {} if root is None else {"disk_path": str(root)}
        config = load_config(
            {
                "codec": "raw",
                "memory_bytes": room * BOUND,
                "load_gate": False,
                "store_policy": "eager",
                **disk,
                **extra,
            }
        )
        arena = SharedArena(config.memory_capacity) if one_copy else None
        self._arena = arena
        self.scheduler = KVTCScheduler(config, SHAPE, [BOUND], False, one_copy=one_copy)
        meeting = Meeting()
        self.ranks = [Rank(number, meeting, arena, config, root) for number in range(2)]
        self._threads = ThreadPoolExecutor(2)
        self.both(Rank.begin)
        self.bad: set[int] = set()
        self.silent: set[int] = set()
        """Ranks whose reports are lost."""
        self._ended: Counter[str] = Counter()
        self._requests = 0
        self._closed = False
        inventories = {rank: each.worker.inventory() for rank, each in enumerate(self.ranks)}
        self.scheduler.restore({r: found for r, found in inventories.items() if found is not None})

    @property
    def arena(self) -> SharedArena:
        """Of both ranks."""
        assert self._arena is not None
        return self._arena

    def both(self, call: Callable[[Rank], Result]) -> list[Result]:
        """On both ranks at once."""
        return list(self._threads.map(call, self.ranks))

    def apply(self, step: StepMetadata) -> None:
        """A step, and its results as vLLM aggregates them."""
        reports: WorkerReport | None = None
        results = self.both(lambda rank: rank.turn(step))
        for number, (finished, bad, report) in enumerate(results):
            self.bad |= bad
            self._ended.update(finished)
            if report is not None and number not in self.silent:
                reports = report if reports is None else reports.aggregate(report)
        ended = {name for name, count in self._ended.items() if count == 2}
        for name in ended:
            del self._ended[name]
        self.scheduler.apply_report(reports, ended)

    def step(self) -> None:
        """One in which nothing is computed."""
        self.apply(self.scheduler.plan_step(FakeOutput()))

    def step_until(self, reached: Callable[[], bool]) -> None:
        """Step until it is so; fails if that takes too long."""
        until = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < until
            self.step()

    def settle(self) -> None:
        """Steps until nothing is under way."""
        self.step_until(lambda: not self.scheduler.has_pending_work())

    def written(self, chunks: int) -> int:
        """Step until so many chunks are known to be on disk; returns the files that there are."""
        disk = self.scheduler.disk
        assert disk is not None
        assert self.root is not None
        self.step_until(lambda: len(disk) >= chunks)
        return len(list(self.root.rglob("*.kvtc")))

    def compute(self, name: str, block: int = 0, chunks: int = 1) -> None:
        """A prompt in blocks from `block` on, whose stores begin."""
        self._requests += 1
        request = FakeRequest(f"store-{self._requests}", chunks * CHUNK + 1, name)
        blocks = list(range(block, block + chunks * BLOCKS + 1))
        self.apply(start(self.scheduler, request, blocks, request.num_tokens))
        self.scheduler.finish(request)

    def store(self, name: str, block: int = 0, chunks: int = 1) -> None:
        """A prompt in blocks from `block` on, and all that follows."""
        self.compute(name, block, chunks)
        self.settle()

    def found(self, name: str, chunks: int = 1) -> int | None:
        """Tokens of a prompt that are offered; None: ask again."""
        request = FakeRequest(f"look-{name}", chunks * CHUNK + 1, name)
        found = self.scheduler.match(request, 0)
        self.scheduler.finish(request)
        return found

    def begin_load(self, name: str, block: int, chunks: int = 1) -> StepMetadata:
        """Order a load of what is offered into blocks from `block` on; no rank knows of it yet."""
        request = FakeRequest(f"load-{name}", chunks * CHUNK + 1, name)
        until = time.monotonic() + PATIENCE
        while (tokens := self.scheduler.match(request, 0)) is None:
            assert time.monotonic() < until
            self.step()
        assert tokens == chunks * CHUNK
        blocks = list(range(block, block + chunks * BLOCKS + 1))
        self.scheduler.plan_load(request, (blocks,), tokens)
        return self.scheduler.plan_step(FakeOutput())

    def abort(self, step: StepMetadata) -> None:
        """The request of a load ends before its load does."""
        (job,) = step.loads
        state = self.scheduler._requests.get(job.request_id)
        assert state is not None
        self.scheduler.finish(state.request)
        self.apply(self.scheduler.plan_step(FakeOutput(finished_req_ids={job.request_id})))

    def load(self, name: str, block: int, chunks: int = 1) -> set[int]:
        """Load what is offered into blocks from `block` on; returns the bad ones."""
        self.bad = set()
        self.apply(self.begin_load(name, block, chunks))
        self.settle()
        return self.bad

    def counters(self) -> Counter[str]:
        """Of both ranks, since the last call."""
        counts: Counter[str] = Counter()
        for rank in self.ranks:
            stats = rank.worker.take_stats()
            counts.update(stats.data if stats is not None else {})
        return counts

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.both(lambda rank: rank.worker.shutdown())
        self._threads.shutdown()
