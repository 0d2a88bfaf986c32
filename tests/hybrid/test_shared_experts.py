"""Two data-parallel engines that share a model's experts: real processes on the CPU build."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.connector.test_tensor_parallel import namespaces
from tests.hybrid.families import make_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs them"
    ),
]

ENGINES = 2
SCRIPT = """
import json, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {connector!r}]

def main():
    from tests.connector.test_tensor_parallel import namespaces
    from tests.hybrid.running import ask, prompts, start
    import os
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    extra = dict(codec="raw", memory_bytes="64MiB", disk_path={disk!r})
    options = dict(enable_expert_parallel=True, block_size=16, **{options!r})
    with start(Path({model!r}), extra, **options) as llm:
        answers = ask(llm, prompts(2, 300, seed=int(os.environ["VLLM_DP_RANK"])), tokens=4)
        until = time.monotonic() + 60
        while len(namespaces(Path({disk!r}))) < {names} and time.monotonic() < until:
            time.sleep(0.5)
        time.sleep(3)  # for reports, and for the other engine, which computes with this one
    json.dump([answer.tokens for answer in answers], open(sys.argv[1], "w"))

if __name__ == "__main__":
    main()
"""


def run(model: Path, directory: Path, disk: Path, names: int, **options: Any) -> None:
    """Both engines on one directory until it has so many namespaces with chunks."""
    directory.mkdir()
    script = directory / "run.py"
    root = Path(__file__).parents[2]
    script.write_text(
        SCRIPT.format(
            root=str(root),
            connector=str(root / "tests" / "connector"),
            disk=str(disk),
            model=str(model),
            options=options,
            names=names,
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    engines = []
    for rank in range(ENGINES):
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": str(cores[rank % len(cores)]),
            "VLLM_DP_RANK": str(rank),
            "VLLM_DP_RANK_LOCAL": str(rank),
            "VLLM_DP_SIZE": str(ENGINES),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(port),
        }
        with (directory / f"{rank}.log").open("w") as log:
            engines.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(directory / f"{rank}.json")],
                    env={**os.environ, **environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        for process in engines:
            process.wait(280)
    finally:
        for process in engines:
            process.kill()
    for rank in range(ENGINES):
        text = (directory / f"{rank}.log").read_text()
        assert (directory / f"{rank}.json").exists(), text[-3000:]


def test_names_are_of_the_experts_of_both(tmp_path: Path) -> None:
    model, disk = make_model("gptoss", tmp_path / "model"), tmp_path / "disk"
    run(model, tmp_path / "one", disk, names=2)
    before = namespaces(disk)
    assert len(before) == 2
    run(model, tmp_path / "again", disk, names=2)
    assert namespaces(disk) == before
    # Other weights in the second engine: what the first computes with its experts is other KV too.
    run(
        model,
        tmp_path / "other",
        disk,
        names=4,
        worker_extension_cls="other_weights.Extension",
    )
    assert len(namespaces(disk) - before) == 2
