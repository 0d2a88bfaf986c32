"""One OpenAI-compatible server: ask with streaming, read its metrics."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.load_test.metrics_page import Samples, parse

Messages = list[dict[str, str]]


@dataclass
class Answer:
    """One request, measured from outside. Times in seconds.

    sent: time.perf_counter() when it was sent. ttft: to the first token. latency: to the last one.
    itl: between neighbouring events with text. prompt_tokens, output_tokens: as the server counts.
    error: why there is no answer, "" if there is one.
    """

    sent: float
    text: str = ""
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""


class Server:
    """Used by one event loop. `async with` it: it holds connections."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str = "",
        timeout_seconds: float = 600.0,
        ignore_eos: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise LoadTestError(f"{url!r} is no address such as http://localhost:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._extra: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Server:
        # No limit: the number of clients is the limit.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=self._timeout,
            headers=self._headers,
            read_bufsize=2**20,
        )
        try:
            self.model = self.model or await self._only_model()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, messages: Messages, output_tokens: int) -> Answer:
        """One greedy chat completion. A failure is an `Answer` with an error, no exception."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }
        answer = Answer(time.perf_counter())
        try:
            async with self._open.post(f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    said = (await response.text())[:200]
                    answer.error = f"status {response.status}: {said}"
                    return answer
                await _read(response, answer)
        except (TimeoutError, aiohttp.ClientError, ValueError, OSError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    async def metrics(self) -> Samples:
        """The server's metrics now. Raises LoadTestError if it has no such page."""
        try:
            return parse(await self._get("/metrics"))
        except LoadTestError as error:
            raise LoadTestError(f"{error}; --no-metrics does without") from error

    async def _only_model(self) -> str:
        page = await self._get("/v1/models")
        try:
            return str(json.loads(page)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise LoadTestError(
                f"{self.url}/v1/models names no model; is this an OpenAI-compatible server?"
            ) from error

    async def _get(self, path: str) -> str:
        try:
            async with self._open.get(f"{self.url}{path}") as response:
                if response.status != 200:
                    raise LoadTestError(f"{self.url}{path} answers {response.status}, not 200")
                return await response.text()
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            # aiohttp's time-out has no words of its own.
            why = str(error) or "no answer in time"
            raise LoadTestError(f"{self.url}{path} cannot be read: {why}") from error

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the server is used outside `async with`")
        return self._session


async def _read(response: aiohttp.ClientResponse, answer: Answer) -> None:
    """Fill in an answer from its events. Raises ValueError for what is no such event."""
    last = answer.sent
    async for event in _events(response):
        if error := event.get("error"):
            answer.error = f"the stream ended with {str(error)[:200]}"
            return
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            words = delta.get("content") or delta.get("reasoning_content") or ""
            if not words:
                continue
            now = time.perf_counter()
            if answer.text:
                answer.itl.append(now - last)
            else:
                answer.ttft = now - answer.sent
            answer.text += words
            answer.latency, last = now - answer.sent, now
        if usage := event.get("usage"):
            answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            answer.output_tokens = int(usage.get("completion_tokens") or 0)
    if not answer.text:
        answer.error = "the stream ended without a token"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        data = line.decode(errors="replace").strip()
        if data.startswith("data:") and (data := data.removeprefix("data:").strip()) != "[DONE]":
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError(f"an event holds {type(event).__name__}, an object is right")
            yield event
