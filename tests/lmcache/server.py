"""`lmcache server` with KVTC, and vLLM engines, as processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_vllm.lmcache.command import commands
from tests.lmcache.client import MARK
from tests.lmcache.storage import free_port

START_SECONDS = 300
CLIENT_SECONDS = 900
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "reference_model" / "model"
SETTINGS = {"model": str(MODEL), "page_order": "cpu", "block_size": 32}


@dataclass
class Server:
    """A running LMCache server."""

    port: int
    http_port: int
    process: subprocess.Popen[bytes]

    def counters(self) -> dict[str, int]:
        """Our counters, from the server's Prometheus page."""
        page = urllib.request.urlopen(f"http://localhost:{self.http_port}/metrics", timeout=30)
        text = page.read().decode()
        lines = re.findall(r'^lmcache_kvtc_(\w+)_total(?:{reason="(\w+)"})? (\S+)$', text, re.M)
        return {f"{n}/{r}" if r else n: int(float(v)) for n, r, v in lines}

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is closed."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def lmcache_server(
    log: Path, preset: str, overrides: dict[str, Any], mode: str = "auto"
) -> Iterator[Server]:
    """A server as `kvtc config lmcache` prints it, small, on ports of its own."""
    port, http_port = free_port(), free_port()
    small = {"server.port": port, "server.http-port": http_port, "server.l1-size-gb": 0.5}
    words, _ = commands(preset, {**SETTINGS, **small, **overrides})
    words[0] = str(Path(sys.executable).with_name("lmcache"))
    words += ["--no-l1-use-lazy", "--supported-transfer-mode", mode]
    words += ["--prometheus-port", str(free_port())]
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env=environment)
        server = Server(port, http_port, process)
        try:
            deadline = time.monotonic() + START_SECONDS
            while b"Application startup complete" not in log.read_bytes():
                assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def run_client(log: Path, **request: Any) -> dict[str, Any]:
    """What `client.py` prints."""
    with log.open("wb") as errors:
        done = subprocess.run(
            [sys.executable, "-m", "tests.lmcache.client", json.dumps(request)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            timeout=CLIENT_SECONDS,
        )
    lines = [x for x in done.stdout.decode().splitlines() if x.startswith(MARK)]
    said = f"{done.stdout.decode()[-500:]}{log.read_text()[-3000:]}"
    assert done.returncode == 0, said
    assert lines, said
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    return found
