"""Conversations outlive kill -9 of every process; a hung disk costs its deadline. Real engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.cli import main as kvtc
from kvtc_vllm.tiers.disk import OsFileSystem
from kvtc_vllm.vllm_cache.compat import UnsupportedError, check_stable_hashes, vllm_version
from tests.connector.conversations import COUNT, TOKENS
from tests.connector.engine import engine, greedy, metrics, texts

pytestmark = pytest.mark.vllm

RELOADED = COUNT * 544
"""Of each second turn (692 tokens) all blocks before the recent window of 128."""


def run(
    how: str, model: Path, tier: Path, results: Path, changes: dict[str, Any]
) -> subprocess.Popen:
    """A conversation process that leads a process group of its own."""
    log = results.with_name(f"{how}.log").open("w")
    program = "tests.connector.conversations"
    arguments = [str(model), str(tier), str(results), how, json.dumps(changes)]
    return subprocess.Popen(
        [sys.executable, "-m", program, *arguments],
        cwd=Path(__file__).parents[2],
        # What vLLM before 0.29 needs, later ones ignore.
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.crash
@pytest.mark.long
def test_conversations_resume_after_kill_9(reference_model: Path, tmp_path: Path) -> None:
    resume_after_kill_9(reference_model, tmp_path)


def resume_after_kill_9(
    model: Path, directory: Path, **changes: Any
) -> dict[str, dict[str, float]]:
    """Kill an engine that stores, and go on with another; counters of both by what they did.

    changes: of the configuration.
    """
    tier, results = directory / "tier", directory / "results.json"
    first = run("first", model, tier, results, changes)
    try:
        while not results.exists():
            assert first.poll() is None, (directory / "first.log").read_text()[-3000:]
            time.sleep(0.1)
        before = len(list(tier.rglob("*.kvtc")))
        while len(list(tier.rglob("*.kvtc"))) < before + 10:  # it stores while it dies
            assert first.poll() is None
            time.sleep(0.01)
    finally:
        kill(first)
    resumed = run("resume", model, tier, results, changes)
    try:
        assert resumed.wait(600) == 0, (directory / "resume.log").read_text()[-3000:]
    finally:
        if resumed.poll() is None:
            kill(resumed)
    known = json.loads(results.read_text())
    assert known["resumed"]["answers"] == known["uninterrupted"]["answers"]
    assert known["uninterrupted"]["metrics"]["kvtc_loaded_tokens"] == RELOADED
    found = known["resumed"]["metrics"]
    assert found["kvtc_loaded_tokens"] == found["kvtc_hit_tokens"] == RELOADED
    assert found["kvtc_promoted_chunks"] == COUNT * 5
    assert not any(count for name, count in found.items() if name.startswith("kvtc_disk_errors"))
    assert not list(tier.rglob("*.tmp"))
    assert kvtc(["verify", str(tier)]) == 0
    return {how: known[how]["metrics"] for how in ("uninterrupted", "resumed")}


@pytest.mark.skipif(
    not vllm_version().startswith(("0.26", "0.27", "0.28")),
    reason="this vLLM's block hashes are the same after every start",
)
def test_random_block_hashes_are_refused(reference_model: Path, tmp_path: Path) -> None:
    from tests.connector.conversations import extra

    assert "PYTHONHASHSEED" not in os.environ
    with (
        pytest.raises(UnsupportedError, match="set PYTHONHASHSEED=0"),
        engine(reference_model, extra(str(tmp_path / "tier"))),
    ):
        pass
    assert not (tmp_path / "tier").exists()


def test_which_versions_need_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    for version in ("0.29.0", "0.32.0+cpu", "0.33.1"):
        check_stable_hashes(version, "sha256")
        check_stable_hashes(version, "sha256_cbor")
        for algorithm in ("xxhash", "xxhash_cbor"):
            with pytest.raises(UnsupportedError, match="or use sha256 or sha256_cbor") as caught:
                check_stable_hashes(version, algorithm)
            assert f"prefix_caching_hash_algo='{algorithm}'" in str(caught.value)
    for version in ("0.26.0", "0.28.0+cpu"):
        for algorithm in ("sha256", "xxhash_cbor"):
            with pytest.raises(UnsupportedError, match=r"set PYTHONHASHSEED=0, or use vLLM 0\.29"):
                check_stable_hashes(version, algorithm)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    for version in ("0.28.0", "0.32.0"):
        for algorithm in ("sha256", "xxhash"):
            check_stable_hashes(version, algorithm)


# ------------------------------------------------------------------------ a hung disk

DEADLINE = 3.0


def watch_waits(llm: Any) -> dict[str, list[float]]:
    """When it was asked whether each request waits for disk, by its id; filled from now on."""
    promotions = llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler._promotions
    asked: dict[str, list[float]] = {}

    def watch(name: str) -> None:
        method = getattr(promotions, name)

        def watched(request_id: str, *arguments: Any) -> bool:
            asked.setdefault(request_id, []).append(time.monotonic())
            return method(request_id, *arguments)

        setattr(promotions, name, watched)

    for name in ("is_waiting", "must_wait"):
        watch(name)
    return asked


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While set, whoever opens a chunk's file hangs."""
    hanging, released = threading.Event(), threading.Event()
    real = OsFileSystem.open

    def open_or_hang(self: OsFileSystem, path: str, flags: int) -> int:
        if hanging.is_set() and path.endswith(".kvtc"):
            released.wait()
        return real(self, path, flags)

    monkeypatch.setattr(OsFileSystem, "open", open_or_hang)
    yield hanging
    released.set()


def test_a_hung_disk_costs_a_request_its_deadline_and_others_nothing(
    reference_model: Path, tmp_path: Path, hang: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    monkeypatch.setenv("PYTHONHASHSEED", "0")  # for vLLM before 0.29
    prompts = texts(reference_model, count=5, tokens=TOKENS)
    config = {
        "codec": "kvtc",
        "ratio": 8,
        "memory_bytes": "64MiB",
        "disk_path": str(tmp_path),
        "disk_min_free": 0,
        "load_gate": False,
        "load_deadline": DEADLINE,
    }
    with engine(reference_model, config) as llm:
        expected = greedy(llm, prompts[:2], 8)
    with engine(reference_model, config) as llm:
        greedy(llm, prompts[4:], 8)  # all that is compiled or started once
        hang.set()  # the disk goes now, after the index was read
        asked = watch_waits(llm)
        settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        for name, number in (("hung", 0), ("other", 2), ("another", 3)):
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompts[number]}, settings)
        ended: dict[str, float] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    ended[output.request_id] = time.monotonic()
                    if output.request_id == "hung":
                        assert list(output.outputs[0].token_ids) == expected[0]
        times = next(times for name, times in asked.items() if name.startswith("hung"))
        print("waited", times[-1] - times[0], "s in", len(times), "steps")
        # The step after the deadline tells it, which may take long on a busy machine.
        assert DEADLINE <= times[-1] - times[0] <= DEADLINE * 2
        assert max(ended["other"], ended["another"]) < times[-1], "the others had to wait"
        assert len(times) > 20 * DEADLINE, "the engine did not go on stepping"

        # From now on nobody waits at all: the threads are known to hang.
        time.sleep(DEADLINE / 3)  # reads begin, and end, after the request that asked for them
        asked.clear()
        assert greedy(llm, prompts[1:2], 8) == expected[1:]
        ((first, *_, last),) = asked.values()
        assert last - first < DEADLINE / 3
        found = metrics(llm)
    assert found["kvtc_expired_waits"] == 1
    # The second request is not even told to wait, or its reads are given up at once.
    failed = found["kvtc_disk_errors/deadline"] + found["kvtc_disk_errors/stalled"]
    assert failed + 4 * found["kvtc_refused_waits"] == 8
    assert found["kvtc_loaded_tokens"] == 0
