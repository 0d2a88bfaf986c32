"""Weights that change while an engine runs: no KV of the one model serves the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, metrics
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.models import WEIGHTS, push, updated_model
from tests.reliability.live.replica import MARK
from tests.reliability.live.stepping import Run, chunk_files, count, raw, wait_for

pytestmark = pytest.mark.vllm

SHOWN = 3
"""Prompts that the model before the update has seen; the others are new after it."""
LOADED = SHOWN * 608
"""Of their 640 tokens: all blocks but the last, whose logits are needed."""


def reload(llm: Any, weights: Path) -> None:
    """What a trainer does to a server."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})


def reloaded(llm: Any, prompts: Tokens) -> tuple[Tokens, float]:
    """Answers when the tier is all there is, and the tokens that it gave."""
    llm.reset_prefix_cache()
    already = count(llm, "loaded_tokens")
    answers = greedy(llm, prompts, ANSWER)
    return answers, count(llm, "loaded_tokens") - already


def test_an_update_in_place_and_a_reset_begin_a_new_model(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
) -> None:
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        reload(llm, updated)
        assert llm.reset_prefix_cache(reset_connector=True)
        assert greedy(llm, prompts[:SHOWN], ANSWER) == after[:SHOWN]
        assert count(llm, "loaded_tokens") == 0
        assert reloaded(llm, prompts[:SHOWN]) == (after[:SHOWN], LOADED)
        changes = count(llm, "weight_changes")
    with engine(reference_model, raw(tmp_path)) as llm:  # the old weights are served again
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        assert count(llm, "loaded_tokens") == LOADED
    assert changes == 1


def test_an_update_in_place_without_a_reset_of_the_tier_begins_a_new_model(
    reference_model: Path, updated: Path, prompts: Tokens, after: Tokens
) -> None:
    with engine(reference_model, raw()) as llm:
        greedy(llm, prompts[:SHOWN], ANSWER)
        reload(llm, updated)
        assert reloaded(llm, prompts[:SHOWN]) == (after[:SHOWN], 0)
        assert reloaded(llm, prompts[:SHOWN]) == (after[:SHOWN], LOADED)
        failures = {k for k, v in metrics(llm).items() if k.startswith("kvtc_failed_loads") and v}
        assert failures <= {"kvtc_failed_loads/changed"}


def test_a_request_that_is_under_way_during_an_update_is_stored_for_no_model(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
) -> None:
    """The KV of its prompt is in part the one model's and in part the other's."""
    with engine(reference_model, raw(tmp_path), max_num_batched_tokens=256) as llm:
        run = Run(llm)
        run.add(prompts[:1], ANSWER)
        run.step()
        assert not run.answers, "the whole prompt was computed before the update"
        reload(llm, updated)
        run.finish()
        assert reloaded(llm, prompts[:1]) == (after[:1], 0)
        assert reloaded(llm, prompts[:1]) == (after[:1], 608)
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:1], ANSWER) == before[:1]


def test_an_update_in_place_without_any_reset_leaves_no_chunk_to_the_model_before(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
) -> None:
    """New prompts, in which vLLM's own prefix cache has no part."""
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        reload(llm, updated)
        assert greedy(llm, prompts[SHOWN:], ANSWER) == after[SHOWN:]
        assert reloaded(llm, prompts[SHOWN:]) == (after[SHOWN:], LOADED)
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[SHOWN:], ANSWER) == before[SHOWN:]
        assert count(llm, "loaded_tokens") == 0
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        assert count(llm, "loaded_tokens") == LOADED


@pytest.mark.parametrize("reset_connector", [False, True], ids=["gpu_reset", "full_reset"])
def test_weights_go_there_and_back(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
    reset_connector: bool,
) -> None:
    chosen = prompts[:SHOWN]
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, chosen, ANSWER) == before[:SHOWN]
        for weights, expected in ((updated, after), (reference_model, before), (updated, after)):
            reload(llm, weights)
            assert llm.reset_prefix_cache(reset_connector=reset_connector)
            assert greedy(llm, chosen, ANSWER) == expected[:SHOWN]
            assert reloaded(llm, chosen) == (expected[:SHOWN], LOADED)
        changes = count(llm, "weight_changes")
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, chosen, ANSWER) == before[:SHOWN]
        assert count(llm, "loaded_tokens") == LOADED
    assert changes == 3


def test_weights_replaced_with_the_size_and_time_of_the_old_ones_are_others(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
) -> None:
    """Within one process, which may remember what it read."""
    model = updated_model(reference_model, tmp_path / "model", amount=0)
    push(reference_model, model, WEIGHTS)
    disk = tmp_path / "tier"
    with engine(model, raw(disk)) as llm:
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
    push(updated, model, WEIGHTS, keep_times=True)
    for loaded in (0, LOADED):
        with engine(model, raw(disk)) as llm:
            assert greedy(llm, prompts[:SHOWN], ANSWER) == after[:SHOWN]
            assert count(llm, "loaded_tokens") == loaded


def test_sleep_leaves_what_is_on_disk_to_restarts(
    reference_model: Path, prompts: Tokens, before: Tokens, tmp_path: Path
) -> None:
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        wait_for(llm, "disk_written_chunks", SHOWN * 5)
        ((namespace, stored),) = chunk_files(tmp_path).items()
        llm.sleep(1)
        llm.wake_up()
        assert greedy(llm, prompts[SHOWN:], ANSWER) == before[SHOWN:]
        wait_for(llm, "disk_written_chunks", 2 * SHOWN * 5)
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        assert count(llm, "loaded_tokens") == 0, "a reset forgets, for this engine"
        wait_for(llm, "disk_written_chunks", 3 * SHOWN * 5)
    assert len(stored) == SHOWN * 5
    assert chunk_files(tmp_path).get(namespace) == stored
    with engine(reference_model, raw(tmp_path)) as llm:
        assert greedy(llm, prompts[:SHOWN], ANSWER) == before[:SHOWN]
        assert count(llm, "loaded_tokens") == LOADED


def test_a_reset_writes_elsewhere_and_deletes_nothing(
    reference_model: Path, prompts: Tokens, before: Tokens, tmp_path: Path
) -> None:
    with engine(reference_model, raw(tmp_path)) as llm:
        greedy(llm, prompts[:1], ANSWER)
        wait_for(llm, "disk_written_chunks", 5)
        ((namespace, stored),) = chunk_files(tmp_path).items()
        assert llm.reset_prefix_cache(reset_connector=True)
        assert greedy(llm, prompts[1:2], ANSWER) == before[1:2]
        wait_for(llm, "disk_written_chunks", 10)
        found = chunk_files(tmp_path)
        assert found.pop(namespace, set()) == stored
        ((_, others),) = found.items()
        assert len(others) == 5
        assert not others & stored
    # What nobody can ever ask for again may go when its engine ends; the rest stays.
    assert chunk_files(tmp_path)[namespace] == stored


class Replica:
    """Another engine on the same directory, in a process of its own."""

    def __init__(self, model: Path, disk: Path, log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.reliability.live.replica", str(model), str(disk)],
                cwd=Path(__file__).parents[3],
                env=dict(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def hear(self) -> dict[str, Any]:
        """The next message."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise AssertionError(f"the replica ended: {self.log.read_text()[-3000:]}")

    def ask(self, prompts: Tokens) -> dict[str, Any]:
        """Its answers, and what it has loaded in all."""
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": ANSWER}), file=self.process.stdin)
        self.process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    """Filled by a test; killed after it."""
    started: list[Replica] = []
    yield started
    for replica in started:
        replica.close()


@pytest.mark.slow
def test_a_replica_that_keeps_its_weights_keeps_its_chunks(
    reference_model: Path,
    updated: Path,
    prompts: Tokens,
    before: Tokens,
    after: Tokens,
    tmp_path: Path,
    replicas: list[Replica],
) -> None:
    """Two engines share a directory, one is updated and reset, the other is not."""
    disk = tmp_path / "tier"
    with engine(reference_model, raw(disk)) as llm:
        greedy(llm, prompts[:SHOWN], ANSWER)
        wait_for(llm, "disk_written_chunks", SHOWN * 5)
        replica = Replica(reference_model, disk, tmp_path / "replica.log")
        replicas.append(replica)
        assert replica.hear() == {"ready": True}  # it knows what is on disk
        reload(llm, updated)
        assert llm.reset_prefix_cache(reset_connector=True)
        assert greedy(llm, prompts[:SHOWN], ANSWER) == after[:SHOWN]
        wait_for(llm, "disk_written_chunks", 2 * SHOWN * 5)
        said = replica.ask(prompts[:SHOWN])
        assert said["answers"] == before[:SHOWN]
        assert said["loaded"] == LOADED
        # And nothing that it did is offered here.
        assert reloaded(llm, prompts[:SHOWN]) == (after[:SHOWN], LOADED)
