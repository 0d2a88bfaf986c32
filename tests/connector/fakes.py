"""Stand-ins for what vLLM's scheduler hands to a connector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvtc_vllm.config import load_config
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, check_budget
from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.offload.scheduler import KVTCScheduler

BLOCK = 32
BOUND = 5652
"""Most bytes of a chunk, as if an artifact said so."""


@dataclass
class FakeRequest:
    """A prompt whose block hashes are readable: b"<name>:<block number>"."""

    request_id: str
    num_tokens: int
    name: str = "a"
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or self.num_tokens
        self.grow(self.num_tokens)

    @property
    def all_token_ids(self) -> list[int]:
        """As many as there are, each request's the same."""
        return list(range(self.num_tokens))

    def grow(self, num_tokens: int) -> None:
        """The request now has this many tokens."""
        self.num_tokens = num_tokens
        self.block_hashes = [f"{self.name}:{i}".encode() for i in range(num_tokens // BLOCK)]


@dataclass
class FakeNew:
    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass
class FakeCached:
    req_ids: list[str] = field(default_factory=list)
    new_block_ids: list[Any] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)


@dataclass
class FakeOutput:
    """`SchedulerOutput` as far as the connector reads it."""

    scheduled_new_reqs: list[FakeNew] = field(default_factory=list)
    scheduled_cached_reqs: FakeCached = field(default_factory=FakeCached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)


def geometry(tp_size: int = 1, head_size: int = 8) -> CacheGeometry:
    group = CacheGroup(
        layer_names=("layers.0", "layers.1"),
        block_size=BLOCK,
        num_kv_heads=2,
        head_size=head_size,
        head_size_v=head_size,
        dtype=torch.bfloat16,
    )
    return CacheGeometry((group,), tp_size)


def scheduler(
    ranks: int = 1,
    prompt_only: bool = False,
    loads: bool = True,
    stores: bool = True,
    shares_experts: bool = False,
    **extra: Any,
) -> KVTCScheduler:
    config = load_config({"codec": "kvtc", "memory_bytes": "1MiB", **extra})
    check_budget(config, ranks, BOUND)
    return KVTCScheduler(
        config,
        geometry(ranks),
        [BOUND],
        prompt_only,
        loads,
        stores,
        shares_experts=shares_experts,
    )


class FakeBlockPool:
    """vLLM's pool of blocks as far as a reset of its prefix cache shows."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.cached_block_hash_to_block = object()


@dataclass
class FakeLora:
    lora_int_id: int = 1
    lora_path: str = "somewhere"
    load_inplace: bool = False


def step(side: KVTCScheduler, request: FakeRequest, tokens: int, **fields: Any) -> StepMetadata:
    """Schedule `tokens` more tokens of a request that has run before."""
    cached = FakeCached(
        req_ids=[request.request_id],
        new_block_ids=[fields.get("new_blocks")],
        num_computed_tokens=[request.num_computed_tokens],
        resumed_req_ids={request.request_id} if fields.get("resumed") else set(),
    )
    output = FakeOutput(
        scheduled_cached_reqs=cached, num_scheduled_tokens={request.request_id: tokens}
    )
    metadata = side.plan_step(output)
    request.num_computed_tokens += tokens
    return metadata


def start(
    side: KVTCScheduler, request: FakeRequest, blocks: list[int], tokens: int, local: int = 0
) -> StepMetadata:
    """Look up and schedule a new request, without a load."""
    side.match(request, local)
    side.plan_load(request, (blocks,), 0)
    output = FakeOutput(
        scheduled_new_reqs=[FakeNew(request.request_id, (blocks,), local)],
        num_scheduled_tokens={request.request_id: tokens},
    )
    metadata = side.plan_step(output)
    request.num_computed_tokens = local + tokens
    return metadata


def confirm(side: KVTCScheduler, metadata: StepMetadata, size: int = 1000, rank: int = 0) -> None:
    """A rank reports the stores of a step as done."""
    report = WorkerReport(metadata.epoch, [(s.key, rank, size) for s in metadata.stores])
    side.apply_report(report, None)


def fill(side: KVTCScheduler, request: FakeRequest) -> None:
    """Run a whole prompt and confirm its stores."""
    blocks = list(range(-(-request.num_tokens // BLOCK)))
    confirm(side, start(side, request, blocks, request.num_tokens))
    side.finish(request)
    side.plan_step(FakeOutput(finished_req_ids={request.request_id}))
