"""Running methods in child processes: what is kept when one fails, and which run together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvtc_vllm.evaluation import methods
from kvtc_vllm.evaluation.job import Outcome, Record, StoredBytes, Workload
from kvtc_vllm.evaluation.processes import suite
from kvtc_vllm.evaluation.reporting import report

WORKLOAD = [Workload(task="litm", context=512, count=1)]
NAMES = ("raw", "kvtc-16x")


def outcomes() -> list[Outcome]:
    record = Record(
        task="litm",
        context=512,
        session=0,
        label="",
        is_answer=True,
        prompt_tokens=512,
        reloaded_tokens=384,
        target_tokens=4,
        nll_exact=1.0,
        nll=1.0,
        kl=0.5,
        agreed=4,
        correct_exact=True,
        correct=True,
    )
    return [
        Outcome(
            method=methods.find(name),
            records=[record],
            stored=[StoredBytes(task="litm", context=512, raw=16, stored=1)],
            skipped=[],
            documents=["essays 3"],
        )
        for name in NAMES
    ]


@pytest.mark.parametrize("wrote", [True, False])
def test_what_a_process_measured_before_it_failed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrote: bool
) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        job = msgspec.json.decode(Path(command[-1]).read_bytes())
        if wrote:
            Path(job["out"]).write_bytes(msgspec.msgpack.encode(outcomes()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    plan = [(methods.find(name), WORKLOAD) for name in NAMES]
    with pytest.raises(suite.SuiteError, match="raw, kvtc-16x: its process ended with 1"):
        suite.run_suite(
            str(tmp_path),
            plan,
            seed=0,
            source=None,
            engine={},
            out=tmp_path / "out",
            command="kvtc eval",
            share=True,
        )
    path = tmp_path / "out" / "results.json"
    assert path.exists() == wrote
    if wrote:
        assert {row.method for row in report.read(path)} == {"exact", *NAMES}
        about = msgspec.json.decode(path.read_bytes())["about"]
        assert set(about["seconds"]) == {about["command"]}


def test_methods_with_the_same_workloads_run_together() -> None:
    names = ("raw", "xkv", "kvtc-8x", "gear-2bit", "h2o", "clusterkv")
    usual = [(methods.find(name), WORKLOAD) for name in names]
    other = [(methods.find("kvtc-16x"), [Workload(task="needle", context=512, count=1)])]
    named = [
        [method.name for method in group] for group, _ in suite._groups([*usual, *other], True)
    ]
    assert named == [["raw", "kvtc-8x"], ["xkv", "gear-2bit"], ["h2o", "clusterkv"], ["kvtc-16x"]]
    alone = suite._groups([*usual, *other], False)
    assert [len(group) for group, _ in alone] == [1] * 7
