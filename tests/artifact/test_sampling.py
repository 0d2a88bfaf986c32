"""What is read of a large checkpoint, and that an edit of it shows."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from kvtc_vllm.artifact import sampling
from kvtc_vllm.artifact.sampling import REGION_BYTES, regions, samples

MIB = 2**20


def checkpoint(path: Path, sizes: list[int]) -> Path:
    """A safetensors file with tensors of these bytes."""
    header, end = {}, 0
    for number, size in enumerate(sizes):
        header[f"w{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + os.urandom(end))
    return path


def digest(*paths: Path) -> bytes:
    return b"".join(samples([(path, path.stat().st_size) for path in paths]))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_regions_reach_from_the_first_to_the_last_byte_evenly() -> None:
    found = regions(1000, 10 * MIB, 16)
    assert len(found) == 16
    assert found[0] == (1000, REGION_BYTES)
    assert found[-1] == (1000 + 10 * MIB - REGION_BYTES, REGION_BYTES)
    gaps = [b - a for (a, _), (b, _) in pairwise(found)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("length", [0, 1, REGION_BYTES, 16 * REGION_BYTES])
def test_a_small_tensor_is_read_whole(length: int) -> None:
    assert regions(8, length, 16) == [(8, length)]


def test_every_byte_of_a_small_tensor_counts(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.safetensors", [16 * REGION_BYTES])
    before = digest(path)
    for offset in (-1, -3 * REGION_BYTES - 77, -16 * REGION_BYTES):
        flip(path, offset)
        assert digest(path) != before
        flip(path, offset)
    assert digest(path) == before


def test_an_edit_of_a_sixteenth_of_a_tensor_is_seen(tmp_path: Path) -> None:
    """Wherever it is: regions are no further apart."""
    size = 4 * MIB
    path = checkpoint(tmp_path / "m.safetensors", [size])
    data = path.read_bytes()
    before = digest(path)
    for sixteenth in range(16):
        changed = bytearray(data)
        begin = len(data) - size + sixteenth * size // 16
        changed[begin : begin + size // 15] = bytes(size // 15)
        path.write_bytes(changed[: len(data)])
        assert digest(path) != before


@pytest.mark.parametrize(
    ("tensors", "number"), [(1, 16), (2048, 16), (4096, 8), (10_000, 3), (100_000, 3)]
)
def test_many_tensors_share_the_budget(tensors: int, number: int, tmp_path: Path) -> None:
    plans = [
        sampling._Plan(tmp_path / str(shard), b"header", [(0, MIB)] * (tensors // 2 or 1))
        for shard in range(2 if tensors > 1 else 1)
    ]
    read = [region for _, spans in sampling._batches(plans) for region in spans]
    assert len(read) == tensors * number
    assert len(read) <= max(sampling.REGION_BUDGET, 3 * tensors)


def test_the_order_of_files_counts_and_that_of_threads_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [checkpoint(tmp_path / f"{n}.safetensors", [MIB] * 20) for n in range(4)]
    many = digest(*paths)
    assert many != digest(*reversed(paths))
    monkeypatch.setattr(sampling, "_THREADS", 1)
    assert digest(*paths) == many


def test_other_formats_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    size = (sampling.MOST_REGIONS_OF_A_FILE + 10) * REGION_BYTES
    path.write_bytes(os.urandom(size))
    before = digest(path)
    middle, _ = regions(0, size, sampling.MOST_REGIONS_OF_A_FILE)[2000]
    for offset in (0, middle, size - 1):
        flip(path, offset)
        assert digest(path) != before
        flip(path, offset)


def test_the_header_counts(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.safetensors", [10])
    before = digest(path)
    path.write_bytes(path.read_bytes().replace(b'"w0"', b'"v0"'))
    assert digest(path) != before
