"""An engine in this process, watched and held at chosen moments."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.connector.engine import drain, metrics, worker_arena

HELD_STEPS = 8
"""Steps with all loads held: enough for vLLM to have done all it does without them."""


def raw(directory: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Configuration of the exact codec, with a disk tier in `directory`."""
    disk = {"disk_path": str(directory), "disk_min_free": 0, "load_deadline": 60}
    return {
        "preset": "raw",
        "memory_bytes": 256 << 20,
        **(disk if directory is not None else {}),
        **changes,
    }


def count(llm: Any, name: str) -> float:
    """One of our counters, all reasons together, by its name without kvtc_."""
    found = metrics(llm)
    return sum(v for k, v in found.items() if k.split("/")[0] == f"kvtc_{name}")


def settings(tokens: int, **changes: Any) -> Any:
    """Greedy sampling of exactly so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **changes)


def wait_for(llm: Any, name: str, value: float) -> None:
    """Step until a counter has come to `value`; the disk's threads report in steps only."""
    nothing = settings(1, extra_args={"kv_transfer_params": {"kvtc_store": False}})
    while count(llm, name) < value:
        llm.generate([{"prompt_token_ids": [5] * 8}], nothing, use_tqdm=False)


def chunk_files(directory: Path) -> dict[str, set[str]]:
    """Names of the chunks in each namespace that has any."""
    found: dict[str, set[str]] = {}
    for path in directory.rglob("*.kvtc"):
        found.setdefault(path.relative_to(directory).parts[0], set()).add(path.name)
    return found


def used_blocks(llm: Any) -> int:
    """GPU blocks that some request holds."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - pool.get_num_free_blocks()


def waiting_for_loads(llm: Any) -> int:
    """Requests whose blocks are allocated and whose load has not ended."""
    from vllm.v1.request import RequestStatus

    requests = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    return sum(r.status == RequestStatus.WAITING_FOR_REMOTE_KVS for r in requests)


@contextlib.contextmanager
def held_loads() -> Iterator[threading.Event]:
    """No load of the worker in this process goes on before the event is set, or the end."""
    arena, event = worker_arena(), threading.Event()
    read = arena.read

    def held(key: bytes) -> Any:
        event.wait()
        return read(key)

    arena.read = held
    try:
        yield event
    finally:
        event.set()
        arena.read = read


@dataclass
class Run:
    """Requests that are stepped by hand. peak: most blocks in use after any step."""

    llm: Any
    names: list[str] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)
    peak: int = 0

    def add(self, prompts: Sequence[list[int]], tokens: int) -> None:
        for ids in prompts:
            name = f"request-{id(self)}-{len(self.names)}"
            self.names.append(name)
            self.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, settings(tokens))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for output in self.llm.llm_engine.step():
                if output.finished:
                    self.answers[output.request_id] = list(output.outputs[0].token_ids)
            self.peak = max(self.peak, used_blocks(self.llm))

    def step_until_loads(self, number: int) -> None:
        """Until so many requests are being loaded."""
        while waiting_for_loads(self.llm) < number:
            self.step()

    def abort(self, number: int) -> None:
        self.llm.llm_engine.abort_request([self.names[number]])

    def finish(self) -> list[list[int]]:
        """Answers of those that were not aborted, in order."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()
        drain(self.llm)
        return [self.answers[name] for name in self.names if name in self.answers]
