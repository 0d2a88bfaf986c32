"""Coded units -> blobs: one buffer per blob, written in place."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    NewSection,
    SectionEntry,
    build_entry,
    checksum,
)
from kvtc_vllm.codec.entropy import UnitList, padded, unit_lengths
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.kernels.chunks import shares
from kvtc_vllm.codec.kernels.deflate_nvcomp import host_threads
from kvtc_vllm.codec.streams import DeviceThread, synchronize


@dataclass(frozen=True)
class BlobPlan:
    """A blob of which only the body is missing.

    head: all that comes before it. body: where it lies among the bodies of a step.
    """

    head: bytes
    body: tuple[int, int]

    @classmethod
    def of(
        cls,
        header: bytes,
        exact: Sequence[NewSection],
        rows: bytes,
        unit_table: bytes,
        body: tuple[int, int],
    ) -> BlobPlan:
        """exact: sections that are complete. rows, unit_table: of the others, which follow.

        Raises CodecError if a length does not fit its field.
        """
        entries = [
            SectionEntry(
                section.kind,
                section.coder_id,
                section.group,
                len(section.encoded.units),
                section.raw_length,
                len(section.encoded.body),
            )
            for section in exact
        ]
        units = [section.encoded.units for section in exact if section.encoded.units]
        tables = [UnitList.of(unit_lengths(own)).table for own in units]
        bodies = [padded(section.encoded.body) for section in exact]
        head = (
            header,
            *map(build_entry, entries),
            rows,
            *tables,
            unit_table,
            *bodies,
        )
        return cls(b"".join(head), body)

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        return len(self.head) + self.body[1] - self.body[0] + CHECKSUM_BYTES


@dataclass(frozen=True)
class WrittenBlobs:
    """Blobs that the host's threads are writing. Until they are done, nothing else may be written
    to the thread's pinned memory."""

    parts: list[Future[list[Blob | CodecError]]]

    def result(self) -> list[Blob | CodecError]:
        """All of them, in order."""
        return [blob for part in self.parts for blob in part.result()]


def write_blobs(
    plans: Sequence[BlobPlan | CodecError],
    body: torch.Tensor | None,
    thread: DeviceThread,
    device: torch.device,
) -> WrittenBlobs:
    """Begin to write the blobs of the plans. body: uint8, all bodies, on the host or on `device`.

    thread: whose pinned memory the bodies cross, on the current stream. Waits for the device, and
    not for the blobs.
    """
    there = np.empty(0, np.uint8)
    if body is not None:
        host = body
        if body.device.type != "cpu":
            host = thread.host(body.numel())
            host.copy_(body, non_blocking=True)
            synchronize(device)
        there = host.numpy()

    def write(plan: BlobPlan | CodecError) -> Blob | CodecError:
        if isinstance(plan, CodecError):
            return plan
        view = np.empty(plan.size, np.uint8).data
        first, end = len(plan.head), plan.size - CHECKSUM_BYTES
        view[:first] = plan.head
        # numpy lets other threads run meanwhile, assignment to a slice of a memoryview does not.
        np.copyto(np.frombuffer(view[first:end], np.uint8), there[slice(*plan.body)])
        view[end:] = checksum(view[:end])
        return view

    def write_all(part: Sequence[BlobPlan | CodecError]) -> list[Blob | CodecError]:
        return [write(plan) for plan in part]

    parts = [plans[part.start : part.stop] for part in shares(len(plans))]
    return WrittenBlobs([host_threads().submit(write_all, part) for part in parts])
