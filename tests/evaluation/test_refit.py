"""Fits of the ablations: kept under a name that says what was fitted, and made once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvtc_vllm.artifact.rank_file import read_rank_file
from kvtc_vllm.calibration.capture import CaptureSettings
from kvtc_vllm.calibration.spool import SpoolWriter
from kvtc_vllm.evaluation import refit as module
from kvtc_vllm.evaluation.refit import refit
from tests.calibration.toy import (
    DOC_TOKENS,
    DOCS,
    RATIOS,
    SIZE,
    SIZE_V,
    toy_header,
    toy_rope,
    toy_rows,
)


def write_spool(directory: Path, seed: int) -> Path:
    keys, values = toy_rows(SIZE, seed).bfloat16(), toy_rows(SIZE_V, seed + 1).bfloat16()
    with SpoolWriter(directory, toy_header(), (toy_rope(),)) as writer:
        for doc in range(DOCS):
            heldout = doc == DOCS - 1
            writer.append(keys[doc], values[doc], torch.arange(DOC_TOKENS), doc, heldout)
    return directory


def test_fits_of_other_things_have_other_names(tmp_path: Path) -> None:
    spool, other = (write_spool(tmp_path / name, seed) for seed, name in ((1, "a"), (5, "b")))
    fits = tmp_path / "fits"
    made = [
        refit(spool, fits, RATIOS),
        refit(spool, fits, RATIOS[1:]),
        refit(spool, fits, RATIOS, layers_per_group=1),
        refit(spool, fits, RATIOS, rows=200),
        refit(spool, fits, RATIOS, rope_kept=True),
        refit(other, fits, RATIOS),
    ]
    assert len(set(made)) == len(made)
    assert sorted(fits.iterdir()) == sorted(made)
    artifacts = [read_rank_file(path, 0, 1)[0] for path in made]
    assert len({artifact.fingerprint for artifact in artifacts}) == len(made)
    assert len(artifacts[2].geometry.layer_groups) == 4
    assert artifacts[4].layer_rope == (None,) * 4


def test_a_fit_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = write_spool(tmp_path / "spool", 1)
    made = refit(spool, tmp_path / "fits", RATIOS)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr(module, "fit_rank", fail)
    assert refit(spool, tmp_path / "fits", RATIOS) == made
    with pytest.raises(AssertionError, match="fitted again"):
        refit(spool, tmp_path / "fits", RATIOS, rows=100)
    assert list((tmp_path / "fits").iterdir()) == [made]


class Child:
    """Stands for a process: leaves a file in the spool that it is given."""

    exitcode = 0

    def __init__(self, target: object, args: tuple[CaptureSettings, Path]) -> None:
        self._spool = args[1]

    def start(self) -> None:
        self._spool.mkdir(parents=True)
        (self._spool / "k.bin").touch()

    def join(self) -> None:
        pass


def test_a_capture_that_failed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Child)
    )
    spool = tmp_path / "spool"
    monkeypatch.setattr(Child, "exitcode", 1)
    with pytest.raises(RuntimeError, match="the capture of text ended with 1"):
        module.capture("model", ["text"], 1, {}, spool)
    assert not spool.exists()

    monkeypatch.setattr(Child, "exitcode", 0)
    assert module.capture("model", ["text"], 1, {}, spool) == spool / "rank0"
    assert (spool / "k.bin").exists()
