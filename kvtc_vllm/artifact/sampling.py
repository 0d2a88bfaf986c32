"""What is read of a checkpoint that is too large to be hashed whole.

Of every tensor in a safetensors file up to 16 regions of 4 KiB, evenly spread from its first byte
to its last, so a tensor of 64 KiB or less is read whole. A checkpoint of very many tensors
gets fewer of each, but never less than start, middle and end. Files of other formats do not
say where their tensors are, and get the same regions spread over the file.

Regions are read by many threads, because each is a wait for the disk, and digested in batches;
the digests are combined in order, so the outcome does not depend on the threads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvtc_vllm.codec.errors import ArtifactError

VERSION = 2
"""Changes with anything here that changes a fingerprint."""

REGION_BYTES = 4096
MOST_REGIONS = 16
FEWEST_REGIONS = 3
REGION_BUDGET = 32768
"""Regions of a checkpoint, about; more if there are more than a third as many tensors."""
MOST_REGIONS_OF_A_FILE = 4096
"""Of a format that does not say where its tensors are."""

_BATCH = 64
_THREADS = 16
_MAX_HEADER_BYTES = 100 * 2**20

Span = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True)
class _Plan:
    """A file to sample. header: digest of all that says where things are. spans: its tensors."""

    path: Path
    header: bytes
    spans: list[Span]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make an error of the file system an ArtifactError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error


def samples(files: Sequence[tuple[Path, int]]) -> Iterator[bytes]:
    """Digests that stand for the content of files, given as path and size, in a fixed order.

    Raises ArtifactError if one cannot be read or its safetensors header is malformed.
    """
    with ThreadPoolExecutor(_THREADS, "kvtc-fingerprint") as pool:
        plans = list(pool.map(_plan, files))
        for plan in plans:
            yield plan.header
        yield from pool.map(_digest, _batches(plans))


def regions(offset: int, length: int, number: int) -> list[Span]:
    """Where to read a span: `number` regions from its first to its last byte, or all of it."""
    if length <= number * REGION_BYTES:
        return [(offset, length)]
    last = length - REGION_BYTES
    return [(offset + last * i // (number - 1), REGION_BYTES) for i in range(number)]


def _plan(file_and_size: tuple[Path, int]) -> _Plan:
    path, size = file_and_size
    if path.suffix != ".safetensors":
        return _Plan(path, b"", [(0, size)])
    with reading(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ArtifactError(f"{path}: safetensors header length {length} is out of bounds")
        header = file.read(length)
    begin = 8 + length
    try:
        spans = sorted(
            (begin + int(start), int(end) - int(start))
            for name, entry in json.loads(header).items()
            if name != "__metadata__"
            for start, end in [entry["data_offsets"]]
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path}: safetensors header is malformed: {error!r}") from error
    for offset, of_tensor in spans:
        if not begin <= offset <= offset + of_tensor <= size:
            raise ArtifactError(
                f"{path}: safetensors header names bytes {offset} to {offset + of_tensor}, "
                f"{begin} to {size} are there"
            )
    return _Plan(path, xxhash.xxh3_128_digest(header), spans)


def _batches(plans: Sequence[_Plan]) -> list[tuple[Path, list[Span]]]:
    """The regions of all files in order, in portions for one thread each."""
    tensors = sum(len(plan.spans) for plan in plans)
    shared = REGION_BUDGET // max(1, tensors)
    found = []
    for plan in plans:
        most = MOST_REGIONS if plan.header else MOST_REGIONS_OF_A_FILE
        number = min(most, max(FEWEST_REGIONS, shared))
        spans = [region for span in plan.spans for region in regions(*span, number)]
        found += [(plan.path, spans[i : i + _BATCH]) for i in range(0, len(spans), _BATCH)]
    return found


def _digest(batch: tuple[Path, list[Span]]) -> bytes:
    path, spans = batch
    digest = xxhash.xxh3_128()
    with reading(path), path.open("rb", buffering=0) as file:
        fd = file.fileno()
        with suppress(OSError):  # only advice: nothing near a region will be read
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, length in spans:
            while length and (part := os.pread(fd, length, offset)):
                digest.update(part)
                offset += len(part)
                length -= len(part)
    return digest.digest()
