"""One load test from first to last: servers opened, metrics before and after, one result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from kvtc_vllm.load_test.client import Server
from kvtc_vllm.load_test.conversation import Conversation
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.metrics_page import Samples
from kvtc_vllm.load_test.runner import Request, run
from kvtc_vllm.load_test.summary import compared, counted, summary

SETTLE_SECONDS = 60.0
"""Most time that running stores get to end before the metrics are read."""


async def measure(
    servers: Sequence[Server],
    conversations: Sequence[Conversation],
    clients: int,
    *,
    metrics: bool = True,
    done: Callable[[Request], None] = lambda request: None,
) -> dict[str, Any]:
    """Put the load on one server or on two in alternation; returns the result, ready for JSON.

    metrics: whether the servers' metrics pages are read. Raises LoadTestError for a server that
    cannot be reached, has no metrics page or answered nothing at all.
    """
    if len(servers) not in (1, 2):
        raise LoadTestError(f"{len(servers)} servers are named, 1 or 2 are right")
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server)
        before = [await server.metrics() for server in servers] if metrics else []
        began = time.perf_counter()
        requests = await run(servers, conversations, clients, done)
        duration = time.perf_counter() - began
        after = [await settled(server) for server in servers] if metrics else []
    figures = [summary(requests, place) for place in range(len(servers))]
    for server, own in zip(servers, figures, strict=True):
        if not own["completed"]:
            raise LoadTestError(f"{server.url} answered no request: {'; '.join(own['errors'])}")
    result: dict[str, Any] = {
        "clients": clients,
        "conversations": len(conversations),
        "duration": duration,
        "servers": [
            {"url": server.url, "model": server.model, **own}
            for server, own in zip(servers, figures, strict=True)
        ],
    }
    for place, own in enumerate(result["servers"]):
        if metrics:
            own["metrics"] = counted(before[place], after[place])
    if len(servers) == 2:
        result["paired"] = compared(requests)
    result["requests"] = [row for request in requests for row in _rows(request)]
    return result


async def settled(server: Server) -> Samples:
    """Metrics when running stores have ended, or after `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        first = await server.metrics()
        await asyncio.sleep(0.3)
        second = await server.metrics()
        calm = not _storing(second) and _engine(first) == _engine(second)
        if calm or time.monotonic() > deadline:
            return second


def _storing(samples: Samples) -> bool:
    reserved = samples.get("vllm:kvtc_tier_reserved_bytes", 0.0)
    return reserved > samples.get("vllm:kvtc_tier_used_bytes", 0.0)


def _engine(samples: Samples) -> Samples:
    """Without what moves by itself: the process's clock, and the HTTP layer, which counts us."""
    return {name: value for name, value in samples.items() if name.startswith("vllm:")}


def _rows(request: Request) -> list[dict[str, Any]]:
    return [
        {
            "server": place,
            "conversation": request.conversation,
            "turn": request.turn,
            "ttft_ms": 1e3 * answer.ttft,
            "e2el_ms": 1e3 * answer.latency,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "equal": answer.text == request.answers[0].text,
            "error": answer.error,
        }
        for place, answer in enumerate(request.answers)
    ]
