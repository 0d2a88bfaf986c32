"""Fixtures: a toy model's captured rows, fitted once for all tests of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtc_vllm.calibration.fit import RankFit, fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.spool import SpoolReader, SpoolWriter
from kvtc_vllm.calibration.writing import Description, write_artifact
from tests.calibration.toy import (
    DATA,
    DOC_TOKENS,
    DOCS,
    IDENTITY,
    RATIOS,
    SIZE,
    SIZE_V,
    toy_header,
    toy_rope,
    toy_rows,
)


@pytest.fixture(scope="session")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spool")
    fill(directory)
    return directory


def fill(directory: Path) -> None:
    """Write the toy model's spool."""
    rope = toy_rope()
    keys, values = toy_rows(SIZE, 1), toy_rows(SIZE_V, 2)
    positions = torch.arange(4, 4 + DOC_TOKENS)
    with SpoolWriter(directory, toy_header(), (rope,)) as writer:
        for doc in range(DOCS):
            rotated = rope.apply(keys[doc], positions)
            rotated[:, 1] = keys[doc][:, 1]
            writer.append(
                rotated.bfloat16(), values[doc].bfloat16(), positions, doc, doc == DOCS - 1
            )


@pytest.fixture(scope="session")
def reader(spool: Path) -> SpoolReader:
    return SpoolReader(spool)


@pytest.fixture(scope="session")
def fit(reader: SpoolReader) -> RankFit:
    return _fit(reader, FitSettings(simulation_rows=512))


@pytest.fixture(scope="session")
def paired_fit(reader: SpoolReader) -> RankFit:
    """Of codec 2, K and V of a layer group with one basis."""
    return _fit(reader, FitSettings(codec="kvtc2", paired=True, simulation_rows=512))


def _fit(reader: SpoolReader, settings: FitSettings) -> RankFit:
    return fit_rank(
        reader, reader.geometry, reader.ropes, reader.layer_rope, RATIOS, settings=settings
    )


@pytest.fixture(scope="session")
def written(fit: RankFit, reader: SpoolReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished artifact; tests that change it work on a copy."""
    return write(fit, reader, tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def written_pairs(
    paired_fit: RankFit, reader: SpoolReader, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As `written`, of `paired_fit`."""
    return write(paired_fit, reader, tmp_path_factory.mktemp("registry-of-pairs"))


def write(fit: RankFit, reader: SpoolReader, registry: Path) -> Path:
    """The toy model's artifact."""
    description = Description("org/toy", IDENTITY, "bfloat16", DATA)
    return write_artifact(registry, description, [fit], [reader.probe()])
