"""Coded units -> blobs: one buffer per blob, written in place."""

from __future__ import annotations

from collections.abc import Sequence
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
        tables = [UnitList.of(unit_lengths(section.encoded.units)).table for section in exact]
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


def write_blobs(
    plans: Sequence[BlobPlan | CodecError],
    body: torch.Tensor | None,
    thread: DeviceThread,
    device: torch.device,
) -> list[Blob | CodecError]:
    """The blobs of the plans. body: uint8, all bodies, on the host or on `device`.

    thread: whose pinned memory the bodies cross, on the current stream. Waits for the device.
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

    parts = [plans[part.start : part.stop] for part in shares(len(plans))]
    return [
        blob for found in host_threads().map(lambda p: [*map(write, p)], parts) for blob in found
    ]
