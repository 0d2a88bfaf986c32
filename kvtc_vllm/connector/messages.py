"""Our messages as vLLM carries them between its processes, pickled."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvtc_vllm.offload.messages import StepMetadata, WorkerReport
from kvtc_vllm.tiers.inventory import Inventory


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler -> workers, every step."""

    step: StepMetadata


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """Workers -> scheduler, after a step that had results."""

    report: WorkerReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the message of another rank. vLLM calls it once per rank."""
        assert isinstance(other, ReportMessage)
        return ReportMessage(self.report.aggregate(other.report))


@dataclass
class WorkerStart(KVConnectorHandshakeMetadata):
    """A worker -> the scheduler, once at start.

    entries: (key, bytes) on disk, least recent first; None without a disk. one_copy: whether the
    first rank keeps what all have, for all of them; the same from every rank.
    """

    entries: Inventory | None = None
    one_copy: bool = False
