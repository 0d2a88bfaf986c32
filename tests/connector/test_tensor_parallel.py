"""Two ranks, and two pipeline stages: real worker processes on the CPU build."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.connector.calibrated import calibrate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = """
import json, os, sys
sys.path.insert(0, {tests!r})
def main():
    from engine import engine, greedy, metrics, texts
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from pathlib import Path
    model = Path({model!r})
    prompts = texts(model, count={prompts}, tokens=700)
    options = dict(num_gpu_blocks_override={blocks}, max_num_batched_tokens=512, max_num_seqs=4)
    options.update({options!r})
    found = []
    for extra in json.loads({extras!r}):
        with engine(model, extra, **options) as llm:
            result = [greedy(llm, prompts, {tokens}) for _ in range(2)]
            values = metrics(llm)
        found.append(dict(tokens=result, metrics=values))
    json.dump(found, open({out!r}, "w"))
if __name__ == "__main__":
    main()
"""


TWO_RANKS = {"tensor_parallel_size": 2}
SMALL_CACHE = 68
"""Blocks. Three prompts of 700 tokens fit, until the fifth token of their answers."""


def cores_of_two() -> dict[str, str]:
    """Environment in which vLLM runs two workers on this machine."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1 % len(cores)]}"}


def run_all(
    model: Path,
    extras: Sequence[dict[str, Any]],
    directory: Path,
    options: dict[str, Any] = TWO_RANKS,
    prompts: int = 6,
    tokens: int = 64,
    blocks: int = 72,
) -> list[dict[str, Any]]:
    """Two visits of every prompt to an engine of each configuration, one after the other.

    In a process of their own. options: of the engine. tokens: of an answer.
    """
    directory.mkdir(exist_ok=True)
    out = directory / "out.json"
    script = directory / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(
        SCRIPT.format(
            tests=tests,
            model=str(model),
            extras=json.dumps(extras),
            out=str(out),
            options=options,
            prompts=prompts,
            tokens=tokens,
            blocks=blocks,
        )
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, **cores_of_two()},
        capture_output=True,
        text=True,
        timeout=560 * len(extras),
        check=False,
    )
    assert out.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    return list(json.loads(out.read_text()))


def run(
    model: Path,
    extra: dict[str, Any],
    directory: Path,
    options: dict[str, Any] = TWO_RANKS,
    **how: int,
) -> dict[str, Any]:
    """As `run_all`, of one configuration."""
    (found,) = run_all(model, [extra], directory, options, **how)
    return found


@pytest.mark.long
def test_raw_and_kvtc_on_two_ranks(reference_model: Path, tmp_path: Path) -> None:
    raw, kvtc = run_all(
        reference_model,
        [
            {"preset": "raw", "memory_bytes": "256MiB"},
            {"codec": "kvtc", "ratio": 4, "memory_bytes": "64MiB"},
        ],
        tmp_path,
        tokens=24,
        blocks=SMALL_CACHE,
    )
    first, second = raw["tokens"]
    assert second == first
    values = raw["metrics"]
    assert values["num_preemptions"] > 0
    assert values["external_prefix_cache_hits"] == values["kvtc_hit_tokens"] > 0
    offered = values["kvtc_hit_tokens"] + values.get("kvtc_resumed_hit_tokens", 0)
    assert values["kvtc_loaded_tokens"] == 2 * offered

    assert kvtc["tokens"][0] == first
    assert loads_are_good(kvtc)
    assert agreement(*kvtc["tokens"]) > AGREEMENT


AGREEMENT = 0.6
"""Free-running: one different token changes all that follow, so this is far below the agreement a
position."""
FAMILIES = pytest.mark.skipif(
    os.environ.get("KVTC_FAMILIES") != "all", reason="make test-families runs it"
)


def loads_are_good(found: dict[str, Any]) -> bool:
    """Whether something was loaded, all that vLLM counts, and nothing failed."""
    values = found["metrics"]
    failed = any(values[name] for name in values if name.startswith("kvtc_failed_loads"))
    hits = values["kvtc_hit_tokens"]
    return not failed and values["external_prefix_cache_hits"] == hits > 0


def agreement(one: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """Share of tokens of answers that are the same."""
    pairs = (zip(a, b, strict=True) for a, b in zip(one, other, strict=True))
    same = [a == b for pair in pairs for a, b in pair]
    return sum(same) / len(same)


@FAMILIES
def test_codec_2_on_two_ranks(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has a part of the artifact, in which its K and V share a basis."""
    for name, value in cores_of_two().items():
        monkeypatch.setenv(name, value)  # for the engine that calibrates
    calibrate(reference_model, tmp_path, 100_000, 1024, {"--tp": "2", "--ratios": "4"})
    extra = {"codec": "kvtc2", "ratio": 4, "registry": [str(tmp_path)], "memory_bytes": "64MiB"}
    found = run(reference_model, extra, tmp_path / "run", prompts=4)
    assert loads_are_good(found)
    assert agreement(*found["tokens"]) > AGREEMENT
    values = found["metrics"]
    assert values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] > 4


@FAMILIES
def test_a_restart_and_one_with_other_weights_on_one_rank(
    reference_model: Path, tmp_path: Path
) -> None:
    """Of the same files: what the first rank keeps, too, is then of other weights."""
    disk = tmp_path / "disk"
    extra = {"preset": "raw", "memory_bytes": "256MiB", "disk_path": str(disk)}
    small: dict[str, Any] = {"prompts": 2, "tokens": 16}
    one = run(reference_model, extra, tmp_path / "one", **small)
    before = namespaces(disk)
    assert len(before) == 2

    extension = {"worker_extension_cls": "other_weights.Extension"}
    other = run(reference_model, extra, tmp_path / "other", TWO_RANKS | extension, **small)
    assert other["tokens"][0] != one["tokens"][0]
    assert not other["metrics"].get("kvtc_promoted_chunks")
    assert len(namespaces(disk) - before) == 2

    again = run(reference_model, extra, tmp_path / "again", **small)
    assert again["tokens"] == one["tokens"]
    # Of both ranks, for both prompts, the 640 tokens of whole chunks.
    assert again["metrics"]["kvtc_promoted_chunks"] == 2 * 2 * 5
    assert namespaces(disk) > before


def namespaces(disk: Path) -> set[str]:
    """Those that hold chunks: one per rank and name."""
    return {path.relative_to(disk).parts[0] for path in disk.rglob("*.kvtc")}


STAGES = {
    "pipeline_parallel_size": 2,
    # An eager CPU engine of vLLM 0.32 makes no buffer for what comes from the stage before.
    "enforce_eager": False,
    "compilation_config": {"mode": 3, "backend": "eager"},
}


@FAMILIES
def test_two_stages_and_their_restart(reference_model: Path, tmp_path: Path) -> None:
    """Every stage keeps its own layers; what both have on disk is known before the first prompt."""
    extra = {"preset": "raw", "memory_bytes": "256MiB", "disk_path": str(tmp_path / "disk")}
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


@FAMILIES
def test_kvtc_on_two_stages(reference_model: Path, tmp_path: Path) -> None:
    """Each stage codes its layers by its layer group of one artifact."""
    options = {"--codec": "kvtc", "--ratios": "4", "--layers-per-group": "4", "--tokens": "4000"}
    calibrate(reference_model, tmp_path, 40_000, 1024, options)
    extra = {"codec": "kvtc", "ratio": 4, "registry": [str(tmp_path)], "memory_bytes": "64MiB"}
    found = run(reference_model, extra, tmp_path / "run", STAGES, prompts=4, tokens=32)
    assert loads_are_good(found)
    assert agreement(*found["tokens"]) > AGREEMENT
    values = found["metrics"]
    assert values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] > 4
