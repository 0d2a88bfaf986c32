"""Two ranks, and two pipeline stages: real worker processes on the CPU build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
def main():
    from engine import engine, greedy, metrics, texts
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from pathlib import Path
    model = Path({model!r})
    extra = json.loads({extra!r})
    prompts = texts(model, count=6, tokens=700)
    options = dict(num_gpu_blocks_override=72, max_num_batched_tokens=512, max_num_seqs=4)
    options.update({options!r})
    result = []
    with engine(model, extra, **options) as llm:
        result = [greedy(llm, prompts, 64) for _ in range(2)]
        values = metrics(llm)
    json.dump(dict(tokens=result, metrics=values), open({out!r}, "w"))
if __name__ == "__main__":
    main()
"""


def run(
    model: Path, extra: dict[str, Any], directory: Path, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Two visits of every prompt in a process of their own. options: of the engine."""
    out = directory / "out.json"
    script = directory / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(
        SCRIPT.format(
            tests=tests,
            model=str(model),
            extra=json.dumps(extra),
            out=str(out),
            options=options or {"tensor_parallel_size": 2},
        )
    )
    cores = sorted(os.sched_getaffinity(0))
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1 % len(cores)]}"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert out.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    return dict(json.loads(out.read_text()))


def test_raw_and_kvtc_on_two_ranks(reference_model: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "kvtc").mkdir()
    raw = run(reference_model, {"preset": "raw", "memory_bytes": "256MiB"}, tmp_path / "raw")
    first, second = raw["tokens"]
    assert second == first
    values = raw["metrics"]
    assert values["num_preemptions"] > 0
    assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"] > 0
    offered = values["kvtc_hit_tokens"] + values.get("kvtc_resumed_hit_tokens", 0)
    assert values["kvtc_loaded_tokens"] == 2 * offered

    kvtc = run(
        reference_model, {"codec": "kvtc", "ratio": 4, "memory_bytes": "64MiB"}, tmp_path / "kvtc"
    )
    assert kvtc["tokens"][0] == first
    values = kvtc["metrics"]
    assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"] > 0
    same = [
        a == b
        for x, y in zip(kvtc["tokens"][1], first, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    # Free-running: one different token changes all that follow, so this is far below
    # the agreement a position.
    assert sum(same) / len(same) > 0.6


STAGES = {
    "pipeline_parallel_size": 2,
    # An eager CPU engine of vLLM 0.32 makes no buffer for what comes from the stage before.
    "enforce_eager": False,
    "compilation_config": {"mode": 3, "backend": "eager"},
}


@pytest.mark.skipif(os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs it")
def test_two_stages_and_their_restart(reference_model: Path, tmp_path: Path) -> None:
    """Every stage keeps its own layers; what both have on disk is known before the first prompt."""
    extra = {"preset": "raw", "memory_bytes": "256MiB", "disk_path": str(tmp_path / "disk")}
    for place in ("one", "two", "kvtc"):
        (tmp_path / place).mkdir()
    one = run(reference_model, extra, tmp_path / "one", STAGES)
    first, second = one["tokens"]
    assert second == first
    values = one["metrics"]
    assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"] > 0
    offered = values["kvtc_hit_tokens"] + values.get("kvtc_resumed_hit_tokens", 0)
    assert values["kvtc_loaded_tokens"] == 2 * offered
    assert not any(values[name] for name in values if name.startswith("kvtc_failed_loads"))

    two = run(reference_model, extra, tmp_path / "two", STAGES)
    assert two["tokens"] == [first, first]
    assert two["metrics"]["kvtc_hit_tokens"] > values["kvtc_hit_tokens"]

    # The artifact that comes with the package codes all layers together.
    with pytest.raises(AssertionError, match="codes layers in groups of 8, and a pipeline stage"):
        run(reference_model, {"codec": "kvtc", "ratio": 4}, tmp_path / "kvtc", STAGES)
