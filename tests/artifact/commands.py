"""`kvtc` in processes of their own that need not import torch again: copies of one that has."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Run = Callable[[dict[str, str], tuple[str, ...]], subprocess.CompletedProcess[str]]
"""Runs `kvtc` with these variables as its environment, and these words."""

# huggingface_hub reads its environment as it is imported, and waits half a minute between tries.
PROGRAM = """
import json, os, sys, time
import torch
from kvtc_vllm.cli import main
assert "huggingface_hub" not in sys.modules
time.sleep = lambda seconds: None
for line in sys.stdin:
    environment, words, *places = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(environment)
        for number, place in enumerate(places, start=1):
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def commands(directory: Path) -> Iterator[Run]:
    """For the length of a block. directory: for what commands say."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        asked, told = parent.stdin, parent.stdout
        assert asked is not None
        assert told is not None

        def run(
            environment: dict[str, str], words: tuple[str, ...]
        ) -> subprocess.CompletedProcess[str]:
            places = [directory / name for name in ("stdout", "stderr")]
            print(json.dumps([environment, words, *map(str, places)]), file=asked, flush=True)
            status = int(told.readline())
            return subprocess.CompletedProcess(words, status, *(p.read_text() for p in places))

        yield run
