"""What a child process with several methods tells after each workload."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.evaluation.job import Outcome, Record, SharedJob, StoredBytes

Found = dict[str, tuple[list[Record], StoredBytes]]
"""By method, of one workload."""


def outcomes_so_far(
    job: SharedJob, found: Iterable[Found], **of_all: Any
) -> Iterator[list[Outcome]]:
    """After each workload an outcome per method. of_all: fields that are the same in all."""
    records: dict[str, list[Record]] = {method.name: [] for method in job.methods}
    stored: dict[str, list[StoredBytes]] = {method.name: [] for method in job.methods}
    for workload in found:
        for name, (own, size) in workload.items():
            records[name] += own
            stored[name].append(size)
        yield [
            Outcome(
                method=method,
                records=records[method.name],
                stored=stored[method.name],
                **of_all,
            )
            for method in job.methods
        ]


def write_outcomes(run: Callable[[SharedJob, Any], Iterable[list[Outcome]]]) -> None:
    """Read the job named by the first argument, run it, and write the outcomes after each workload,
    whole or not at all."""
    from transformers import AutoTokenizer

    job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SharedJob)
    out = Path(job.out)
    for outcomes in run(job, AutoTokenizer.from_pretrained(job.model)):
        with replacing(out) as unfinished:
            unfinished.write_bytes(msgspec.msgpack.encode(outcomes))
