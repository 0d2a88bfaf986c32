"""What the demos' client makes of what a server says, against a server of a few lines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import server as client
from benchmarks.demo.server import Server


class FakeVllm(ThreadingHTTPServer):
    """Answers with `events`; its tier's used bytes rise to those reserved, a read at a time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.events: list[dict[str, Any]] = []
        self.status = 200
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.used = iter([100, 200, 300, 300, 300])
        self.reset = True


class Handler(BaseHTTPRequestHandler):
    server: FakeVllm

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        used = next(self.server.used)
        self.reply(
            "# HELP x\n"
            f'vllm:kvtc_tier_used_bytes{{rank="0"}} {used}\n'
            'vllm:kvtc_tier_reserved_bytes{rank="0"} 300\n'
            'vllm:kvtc_hit_tokens_total{rank="0"} 2\n'
            'vllm:kvtc_hit_tokens_total{rank="1"} 3\n'
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.bodies.append((self.path, json.loads(body or b"{}")))
        if self.path == "/reset_prefix_cache":
            self.reply(json.dumps({"success": self.server.reset}))
            return
        lines = [f"data: {json.dumps(event)}\n\n" for event in self.server.events]
        self.reply("".join([*lines, "data: [DONE]\n\n"]))

    def reply(self, text: str) -> None:
        content = text.encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    fake = FakeVllm()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


@pytest.fixture
def server(vllm: FakeVllm, tmp_path: Path) -> Server:
    log = tmp_path / "log"
    log.write_text("last words\n")
    return Server(vllm.server_address[1], None, log, "model")  # type: ignore[arg-type]


def test_a_chat_is_read_from_its_stream(vllm: FakeVllm, server: Server) -> None:
    vllm.events = [
        {"choices": [{"delta": {"role": "assistant"}}]},
        {"choices": [{"delta": {"content": "Yes"}}]},
        {"choices": [{"delta": {"content": "."}}]},
        {"choices": [], "usage": {"prompt_tokens": 17}},
    ]
    answer = server.ask([{"role": "user", "content": "?"}], 8)
    assert (answer.text, answer.prompt_tokens) == ("Yes.", 17)
    assert answer.ttft > 0
    ((path, body),) = vllm.bodies
    assert path == "/v1/chat/completions"
    assert (body["temperature"], body["max_tokens"]) == (0, 8)


def test_a_completion_is_asked_by_token_ids(vllm: FakeVllm, server: Server) -> None:
    vllm.events = [{"choices": [{"text": "so"}]}, {"choices": [], "usage": {"prompt_tokens": 3}}]
    assert server.complete([1, 2, 3], 1).text == "so"
    ((path, body),) = vllm.bodies
    assert (path, body["prompt"]) == ("/v1/completions", [1, 2, 3])


def test_errors_tell_what_the_server_said(vllm: FakeVllm, server: Server) -> None:
    with pytest.raises(RuntimeError, match=r"without a token; the end of .*\nlast words"):
        server.complete([1], 1)
    vllm.status = 400
    vllm.events = [{"error": "no chat template"}]
    with pytest.raises(RuntimeError, match=r"answered 400: .*no chat template"):
        server.ask([], 1)


def test_settling_waits_for_stores_and_sums_over_labels(vllm: FakeVllm, server: Server) -> None:
    assert server.settle()["vllm:kvtc_hit_tokens"] == 5
    assert list(vllm.used) == [300]  # four reads: two of running stores, two of none


def test_stores_that_do_not_end_are_an_error(
    vllm: FakeVllm, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SETTLE_SECONDS", 0.2)
    vllm.used = iter([100] * 100)
    with pytest.raises(RuntimeError, match="stores did not end"):
        server.settle()


def test_a_cache_that_is_in_use_is_not_forgotten(vllm: FakeVllm, server: Server) -> None:
    server.forget()
    vllm.reset = False
    with pytest.raises(RuntimeError, match="blocks are in use"):
        server.forget()
