"""One engine in a process of its own, which reports rows through its standard output.

A CUDA error ends a process for good, and vLLM gives its memory back only when one ends: hence a
process an engine, and a parent that goes on whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.demo.server import ENVIRONMENT

_PLAIN = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""The sampler that needs no package beside vLLM; words are greedy."""
ROOT = Path(__file__).resolve().parents[2]
_MARK = "@row "


def report(row: dict[str, Any]) -> None:
    """In the child: hand a row to the parent."""
    print(_MARK + json.dumps(row), flush=True)


def guarded(call: Callable[[], None], **about: Any) -> int:
    """In the child: exit status of a call; what it raises becomes a row with `about` in it."""
    try:
        call()
    except Exception as error:
        traceback.print_exc()
        report({**about, "error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


def rows_of(
    module: str, arguments: list[str], log: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """In the parent: run a module and yield its rows as they come.

    Everything else it says is added to `log`. Raises RuntimeError with the last line of that if
    it fails or takes longer than `seconds`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        output.write(f"\n=== {module} {' '.join(arguments)}\n")
        output.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**_PLAIN, **os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        timer = threading.Timer(seconds, _kill, [process])
        timer.start()
        last = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(_MARK):
                    yield json.loads(line.removeprefix(_MARK))
                    continue
                output.write(line)
                last = line.strip() or last
        finally:
            late = not timer.is_alive()
            timer.cancel()
            _kill(process)
            status = process.wait()
    if status:
        raise RuntimeError(f"{'killed: out of time; ' if late else ''}status {status}: {last}")


def _kill(process: subprocess.Popen[str]) -> None:
    """End it and what it started, if it has not ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
