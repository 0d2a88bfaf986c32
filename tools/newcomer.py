"""Walks the quick start as a newcomer would, in an empty directory, and times every command.

python -m tools.newcomer --model DIR --texts DIR [--repository URL] [--out build/newcomer.json]

The commands are those of docs/quick-start.md, in order, run by one shell's rules: a `cd` and an
`export` hold for what follows. Only names that the page leaves open are filled in. `vllm serve`
stays up for the rest; commands for a GPU are left out where there is none, those for none where
there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from benchmarks.demo.server import wait_until_ready

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quick-start.md"
SMALL_CACHE = "--block-size 32 --max-model-len 4096 --num-gpu-blocks-override 160"
"""What the page advises for a first look."""
LESS_MEMORY = "--gpu-memory-utilization 0.5"
"""What it advises on a CPU."""
OF_GPU = "cu13"
"""In the command that installs for a GPU."""
OF_CPU = "make setup"
URL = "http://localhost:8000"
"""Of the server on the page."""
START_SECONDS = 900
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Step(TypedDict):
    """One block of commands. Seconds of the wall clock, and of processors by all that it ran.

    commands: as on the page, without what is this machine's own.
    """

    commands: str
    seconds: float
    cpu_seconds: float


def main() -> int:
    """Exit status 1 at the first command that fails, with the end of its output."""
    parser = argparse.ArgumentParser(prog="tools.newcomer", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", default=str(ROOT), help="what to clone")
    parser.add_argument("--model", required=True, help="the newcomer's model")
    parser.add_argument("--texts", required=True, help="texts like those that are served")
    parser.add_argument("--memory", default="2GiB", help="memory_bytes of the tier")
    parser.add_argument("--skip-demo", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "newcomer.json")
    args = parser.parse_args()
    names = {
        "REPOSITORY": args.repository,
        "MODEL": args.model,
        "texts/": args.texts,
        "64GiB": args.memory,
    }
    chosen = [
        block
        for block in blocks(PAGE.read_text())
        if (OF_CPU if has_gpu() else OF_GPU) not in block
    ]
    if args.skip_demo:
        chosen = [block.replace("make demo\n", "") for block in chosen]
    with tempfile.TemporaryDirectory() as folder:
        try:
            steps = list(walk(chosen, names, Path(folder)))
        except WalkError as error:
            print(f"newcomer: {error}", file=sys.stderr)
            return 1
    report = {
        "command": "python -m tools.newcomer --model DIR --texts DIR",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(sum(step["seconds"] for step in steps), 1),
        "steps": steps,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['seconds']:8.1f} s in all")
    return 0


class WalkError(Exception):
    """A command failed; the text says which, and ends with its output."""


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def blocks(page: str) -> list[str]:
    """The page's blocks of shell commands, in order."""
    return [commands for language, commands in _BLOCK.findall(page) if not language]


def filled(block: str, names: Mapping[str, str]) -> str:
    """A block with what the page leaves open, and what it advises for a first look."""
    advised = SMALL_CACHE if has_gpu() else f"{SMALL_CACHE} {LESS_MEMORY}"
    for name, value in names.items():
        block = block.replace(name, value)
    return re.sub(r"^(vllm serve .*)$", rf"\1 {advised}", block, flags=re.MULTILINE)


def walk(chosen: Sequence[str], names: Mapping[str, str], folder: Path) -> Iterator[Step]:
    """Run the page's blocks in `folder`, with `names` filled in; tell each. Raises WalkError."""
    state = folder / "shell-state"
    state.write_text(f"cd {folder}\n")
    with contextlib.ExitStack() as running:
        for number, written in enumerate(chosen):
            block = filled(written, names)
            log = folder / f"step-{number}.log"
            before, used = time.monotonic(), child_seconds()
            if block.startswith("vllm serve"):
                running.enter_context(served(block, state, log))
            else:
                run(block, state, log)
            step = Step(
                commands=written.strip(),
                seconds=round(time.monotonic() - before, 1),
                cpu_seconds=round(child_seconds() - used, 1),
            )
            print(f"{step['seconds']:8.1f} s  {step['commands'].splitlines()[-1]}", flush=True)
            print(indented(tail(log, 4)), flush=True)
            yield step


def run(block: str, state: Path, log: Path) -> None:
    """Run commands as if typed into the shell that `state` remembers."""
    remember = f'{{ echo "cd $PWD"; export -p; }} > {state}'
    script = f"source {state}\nset -e\n{block}\n{remember}\n"
    with log.open("wb") as output:
        done = subprocess.run(
            ["bash", "-c", script], stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    if done.returncode:
        raise WalkError(f"{block.strip()!r} failed:\n{tail(log, 30)}")


@contextlib.contextmanager
def served(block: str, state: Path, log: Path) -> Iterator[None]:
    """A server that is ready; it and what it started end with the block."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            ["bash", "-c", f"source {state}\n{block}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            try:
                wait_until_ready(URL, server, log, START_SECONDS)
            except RuntimeError as error:
                raise WalkError(str(error)) from error
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def environment() -> dict[str, str]:
    """A newcomer's: nothing of an environment that is active here."""
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    own = os.environ.get("VIRTUAL_ENV")
    if own is not None:
        paths = kept["PATH"].split(os.pathsep)
        kept["PATH"] = os.pathsep.join(path for path in paths if not path.startswith(own))
    return kept


def child_seconds() -> float:
    """Of processors, by children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


def indented(text: str) -> str:
    return "\n".join(" " * 12 + line[:140] for line in text.splitlines())


if __name__ == "__main__":
    raise SystemExit(main())
