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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 240
REQUEST_SECONDS = 300
SETTLE_SECONDS = 120
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # By itself vLLM keeps one core from its threads without a connector and two with one; where
    # there are only two, it then takes both. Servers that are compared compute on equally many.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
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


def wait_until_ready(
    base: str, process: subprocess.Popen[bytes], log: Path, seconds: float = START_SECONDS
) -> None:
    """Of a server at the URL `base`. Raises RuntimeError with the end of its log if it fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{base}/health", timeout=2).read()
            return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not start; {tail(log)}")


class Server:
    """A running server. Requests are sent one at a time."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path, model: str) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._process = process
        self._log = log
        self._model = model

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of the log if it does not come up."""
        wait_until_ready(self._base, self._process, self._log)

    def ask(self, messages: list[dict[str, str]], max_tokens: int) -> Answer:
        """One greedy chat completion. Raises RuntimeError with what the server says if it fails."""
        return self._stream("chat/completions", {"messages": messages}, max_tokens)

    def complete(self, token_ids: list[int], max_tokens: int) -> Answer:
        """One greedy completion of a prompt of token ids. Raises RuntimeError as `ask` does."""
        return self._stream("completions", {"prompt": token_ids, "ignore_eos": True}, max_tokens)

    def _stream(self, route: str, body: dict[str, Any], max_tokens: int) -> Answer:
        """One request, streamed to time its first token."""
        body = {
            "model": self._model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }
        request = urllib.request.Request(
            f"{self._base}/v1/{route}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        started = time.perf_counter()
        ttft: float | None = None
        text, prompt_tokens = "", 0
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                for event in _events(response):
                    if event.get("choices"):
                        ttft = ttft or time.perf_counter() - started
                        choice = event["choices"][0]
                        text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                    if event.get("usage"):
                        prompt_tokens = event["usage"]["prompt_tokens"]
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise RuntimeError(f"/v1/{route} answered {error.code}: {said}") from error
        if ttft is None:
            raise RuntimeError(f"/v1/{route} answered without a token; {tail(self._log)}")
        return Answer(text, ttft, prompt_tokens)

    def settle(self) -> dict[str, float]:
        """Wait until all that was to be stored is stored; returns the metrics then.

        Without a connector there is nothing to wait for. Raises RuntimeError if it takes more
        than `SETTLE_SECONDS`.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        calm = 0
        while time.monotonic() < deadline:
            metrics = self.metrics()
            running = metrics.get("vllm:kvtc_tier_reserved_bytes", 0) - metrics.get(
                "vllm:kvtc_tier_used_bytes", 0
            )
            calm = 0 if running else calm + 1
            # Twice: the step that ended the last request may not be counted at once.
            if calm == 2:
                return metrics
            time.sleep(0.05)
        raise RuntimeError(f"stores did not end in {SETTLE_SECONDS} s; {tail(self._log)}")

    def forget(self) -> None:
        """Drop vLLM's own prefix cache, and nothing that the connector holds.

        Needs `VLLM_SERVER_DEV_MODE=1` in the server's environment. Raises RuntimeError if it
        does not succeed.
        """
        request = urllib.request.Request(f"{self._base}/reset_prefix_cache", method="POST")
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            if not json.loads(response.read())["success"]:
                raise RuntimeError("vLLM did not reset its prefix cache: blocks are in use")

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


def end_on_sigterm() -> None:
    """Have SIGTERM end this process as an exception does, so that its servers are stopped too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def tail(log: Path) -> str:
    """The last lines of a log, to be shown with an error."""
    lines = log.read_text(errors="replace").splitlines()[-25:]
    return f"the end of {log}:\n" + "\n".join(lines)


def _events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data and data != "[DONE]":
            yield json.loads(data)


@contextlib.contextmanager
def serve(
    model: Path, arguments: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run `vllm serve` for the length of the block; its output goes to `log`.

    environment: variables beside `ENVIRONMENT`. Raises RuntimeError with the end of the log if
    the server does not come up.
    """
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
            env={**os.environ, **ENVIRONMENT, **(environment or {})},
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
