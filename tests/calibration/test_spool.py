from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kvtc_vllm.calibration import rows as rows_module
from kvtc_vllm.calibration import spool as spool_module
from kvtc_vllm.calibration.spool import SpoolReader, SpoolWriter
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.toy import (
    DOC_TOKENS,
    DOCS,
    HEADS,
    LAYERS,
    SIZE,
    SIZE_V,
    toy_header,
    toy_rope,
    toy_rows,
)


def test_rows_come_back_unrotated(reader: SpoolReader) -> None:
    keys = toy_rows(SIZE, 1)[: DOCS - 1].reshape(-1, LAYERS, HEADS, SIZE)
    assert reader.count(heldout=False) == len(keys)
    assert reader.count(heldout=True) == DOC_TOKENS
    for group, (first, end) in enumerate(reader.geometry.layer_groups):
        rows = reader.rows(group, "k", heldout=False)
        expected = keys[:, first:end].flatten(1)
        # bfloat16 rounds the rotated keys; a missed rotation would be off by the keys themselves.
        assert float((rows - expected).square().mean() / expected.square().mean()) < 1e-5
    values = toy_rows(SIZE_V, 2)[DOCS - 1]
    rows = reader.rows(1, "v", heldout=True)
    assert torch.equal(rows, values[:, 2:].bfloat16().float().flatten(1))


def test_limit_draws_without_replacement(reader: SpoolReader) -> None:
    everything = reader.rows(0, "v", heldout=False)
    generator = torch.Generator().manual_seed(5)
    some = reader.rows(0, "v", heldout=False, limit=50, generator=generator)
    again = reader.rows(0, "v", heldout=False, limit=50, generator=torch.Generator().manual_seed(5))
    assert torch.equal(some, again)
    found = (some[:, None] == everything[None]).all(dim=2)
    assert found.any(dim=1).all()
    assert int(found.any(dim=0).sum()) == 50
    assert len(reader.rows(0, "v", heldout=False, limit=10**6)) == len(everything)


def test_reading_in_blocks(reader: SpoolReader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reader.rows(1, "k", heldout=False)
    monkeypatch.setattr(rows_module, "_BLOCK_BYTES", 4 * 32 * 7)
    assert torch.equal(reader.rows(1, "k", heldout=False), whole)


def test_probe_is_held_out_and_in_order(reader: SpoolReader) -> None:
    probe = reader.probe(100)
    assert probe.k.shape == (100, LAYERS, HEADS, SIZE)
    assert probe.v.shape == (100, LAYERS, HEADS, SIZE_V)
    assert probe.k.dtype == probe.v.dtype == torch.float16
    assert torch.equal(probe.positions, torch.arange(4, 104, dtype=torch.int32))
    keys = toy_rows(SIZE, 1)[DOCS - 1][:100]
    assert float((probe.k.float() - keys).abs().max()) < 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    header = toy_header(dtype=dtype, layer_rope=(None,) * LAYERS, rope_neox=())
    torch_dtype = spool_module.DTYPES[dtype]
    k = torch.randn(6, LAYERS, HEADS, SIZE).to(torch_dtype)
    v = torch.randn(6, LAYERS, HEADS, SIZE_V).to(torch_dtype)
    flags = torch.tensor([True, False] * 3)
    with SpoolWriter(tmp_path, header) as writer:
        writer.append(k, v, torch.arange(6), 0, flags)
        assert writer.rows == 6
    rows = SpoolReader(tmp_path).rows(0, "k", heldout=True)
    assert torch.equal(rows, k[::2, :2].float().flatten(1))


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    header = toy_header(layer_rope=(None,) * LAYERS, rope_neox=())
    k = torch.randn(LAYERS, 3, HEADS, SIZE).bfloat16().transpose(0, 1)
    v = torch.randn(LAYERS, 3, HEADS, SIZE_V).bfloat16().transpose(0, 1)
    with SpoolWriter(tmp_path, header) as writer:
        writer.append(k, v, torch.arange(3), 0, False)
    rows = SpoolReader(tmp_path).rows(1, "v", heldout=False)
    assert torch.equal(rows, v[:, 2:].float().flatten(1))


def test_wrong_tensors_write_nothing(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path, toy_header(), (toy_rope(),)) as writer:
        k = torch.zeros(2, LAYERS, HEADS, SIZE, dtype=torch.bfloat16)
        v = torch.zeros(2, LAYERS, HEADS, SIZE_V, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="v is"):
            writer.append(k, v.float(), torch.arange(2), 0, False)
        with pytest.raises(ValueError, match="k is"):
            writer.append(k[:1], v, torch.arange(2), 0, False)
        writer.append(k, v, torch.arange(2), 0, False)
    assert SpoolReader(tmp_path).header.rows == 2


def test_unfinished_spool_is_refused(tmp_path: Path) -> None:
    def interrupted() -> None:
        with SpoolWriter(tmp_path, toy_header(), (toy_rope(),)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ArtifactError, match="did not finish"):
        SpoolReader(tmp_path)


def test_second_spool_in_one_directory(spool: Path) -> None:
    with pytest.raises(FileExistsError):
        SpoolWriter(spool, toy_header(), (toy_rope(),))


def test_empty_spool_is_refused(tmp_path: Path) -> None:
    SpoolWriter(tmp_path, toy_header(), (toy_rope(),)).close()
    with pytest.raises(ArtifactError, match="empty"):
        SpoolReader(tmp_path)


def test_damage_is_named(spool: Path, tmp_path: Path) -> None:
    copy = tmp_path / "spool"
    shutil.copytree(spool, copy)
    with (copy / "k.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"k\.bin: holds 100 bytes"):
        SpoolReader(copy)


def test_position_outside_the_table(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path, toy_header(), (toy_rope(8),)) as writer:
        k = torch.zeros(2, LAYERS, HEADS, SIZE, dtype=torch.bfloat16)
        v = torch.zeros(2, LAYERS, HEADS, SIZE_V, dtype=torch.bfloat16)
        writer.append(k, v, torch.tensor([9, 1]), 0, False)
    with pytest.raises(ArtifactError, match="outside the RoPE table of 8"):
        SpoolReader(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"layer_names": ("a",)}, "layer_names"),
        ({"layer_rope": (0, 0, 0, 1)}, "layer_rope"),
        ({"rope_neox": (False,)}, "rope_neox"),
    ],
)
def test_contradicting_header(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpoolWriter(tmp_path, toy_header(**changes), (toy_rope(),))
