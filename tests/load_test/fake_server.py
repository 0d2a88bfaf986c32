"""A small OpenAI-compatible server in the test's own process: streams words, counts what it did."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web


class FakeServer:
    """answer: words of every answer. fail_at: number of the request that gets a 500, from 0.

    messages: of all requests, in order. Its prompt tokens are words, and all but the last message
    of a prompt count as hits in the connector's tier.
    """

    def __init__(self, answer: str = "yes it is", delay: float = 0.0) -> None:
        self.answer = answer
        self.delay = delay
        self.fail_at: int | None = None
        self.messages: list[list[dict[str, str]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.metrics: dict[str, float] = {
            "vllm:prompt_tokens_total": 0.0,
            "vllm:external_prefix_cache_hits_total": 0.0,
        }

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.messages)
        self.bodies.append(body)
        self.messages.append(body["messages"])
        if number == self.fail_at:
            return web.Response(status=500, text="out of order")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        counts = [len(message["content"].split()) for message in body["messages"]]
        self._count("vllm:prompt_tokens_total", sum(counts))
        self._count("vllm:external_prefix_cache_hits_total", sum(counts[:-1]))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        words = self.answer.split()
        await self._send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in words:
            await asyncio.sleep(self.delay)
            await self._send(response, {"choices": [{"delta": {"content": f"{word} "}}]})
        usage = {"prompt_tokens": sum(counts), "completion_tokens": len(words)}
        await self._send(response, {"choices": [], "usage": usage})
        self.running -= 1
        await response.write(b"data: [DONE]\n\n")
        return response

    def _count(self, name: str, amount: int) -> None:
        """On a page that has no metric, none appears."""
        if name in self.metrics:
            self.metrics[name] += amount

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = ["# HELP x y", *(f'{n}{{engine="0"}} {v}' for n, v in self.metrics.items())]
        return web.Response(text="\n".join(lines) + "\n")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve for the length of the block; its address."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@contextmanager
def in_a_thread(fake: FakeServer) -> Iterator[str]:
    """Serve beside code that has an event loop of its own, such as a command."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    serving = fake.serving()
    try:
        yield asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(10)
        asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
