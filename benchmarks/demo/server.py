"""One `vllm serve` process: start, ask, read its metrics, stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 240
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True)
class Answer:
    """text: of the assistant. ttft: seconds to the first token. prompt_tokens: of the request."""

    text: str
    ttft: float
    prompt_tokens: int


class Server:
    """A running server. Requests are sent one at a time."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path, model: str) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._process = process
        self._log = log
        self._model = model

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of the log if it does not come up."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self._base}/health", timeout=2).read()
                return
            time.sleep(0.5)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"vllm serve did not start; the end of {self._log}:\n{tail}")

    def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """One greedy chat completion, streamed to time its first token."""
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self._base}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        started = time.perf_counter()
        ttft: float | None = None
        text, prompt_tokens = "", 0
        with urllib.request.urlopen(request, timeout=300) as response:
            for event in _events(response):
                if event.get("choices"):
                    ttft = ttft or time.perf_counter() - started
                    text += event["choices"][0]["delta"].get("content") or ""
                if event.get("usage"):
                    prompt_tokens = event["usage"]["prompt_tokens"]
        assert ttft is not None, "the stream held no choices"
        return Answer(text, ttft, prompt_tokens)

    def metrics(self) -> dict[str, float]:
        """Sums over labels of every sample on /metrics, without `_total`."""
        text = urllib.request.urlopen(f"{self._base}/metrics", timeout=30).read().decode()
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("#") or " " not in line:
                continue
            name, _, value = line.rpartition(" ")
            name = name.split("{")[0].removesuffix("_total")
            values[name] = values.get(name, 0.0) + float(value)
        return values


def _events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != "[DONE]":
            yield json.loads(data)


@contextlib.contextmanager
def serve(model: Path, arguments: list[str], log: Path) -> Iterator[Server]:
    """Run `vllm serve` for the length of the block; its output goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        try:
            server = Server(port, process, log, str(model))
            server.wait_until_ready()
            yield server
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine processes it started."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
