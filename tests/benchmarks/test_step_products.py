"""What fewer multiplications and wider codes cost, on a toy's spool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import basis_parts, step_choices, step_products, step_widths
from kvtc_vllm.calibration.sensitivity import (
    SENSITIVITY_NAME,
    Average,
    Sensitivity,
    SensitivitySource,
    save_sensitivity,
)
from kvtc_vllm.codec.artifact import APART, PAIRED, SectionName
from tests.calibration.fitted import fill
from tests.calibration.toy import LAYERS

RATIO = 4.0


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sensitivities that are all alike."""
    directory = tmp_path_factory.mktemp("measured-spool")
    (directory / "rank0").mkdir()
    fill(directory / "rank0")
    source = SensitivitySource(
        model="", texts="", documents=1, prefix_tokens=1, continuation_tokens=1,
        sink_tokens=4, max_len=1, heldout_fraction=0.1, seed=0,
    )  # fmt: skip
    every = Average(keys=((1.0,),) * LAYERS, values=((1.0,),) * LAYERS, tokens=1)
    save_sensitivity(
        directory / SENSITIVITY_NAME,
        Sensitivity(all_tokens=every, ordinary=None, marked=None, documents=(0,), source=source),
    )
    return directory


def test_parts_save_multiplications_and_cost_error(spool: Path, tmp_path: Path) -> None:
    group = step_products.read_group(spool, LAYERS, 1000)
    found = [
        next(step_products.measured(way, group, [RATIO], tmp_path))
        for way in (step_products.Way(), step_products.Way(bits=4.0), step_products.Way(parts=2))
    ]
    whole, dear, parts = found
    assert dear["columns"] < whole["columns"]
    assert whole["error"] < min(dear["error"], parts["error"])
    # Half of them, but for the few columns of both parts.
    sample, used, _ = step_products.sample_of(step_products.Way(parts=2), group, tmp_path)
    assert sample.coefficients.shape[1] == len(used)
    assert float(used.double().mean()) < 0.6 * sample.row_size


def test_more_escapes_leave_fewer_bytes_to_inflate(
    spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_widths, "ROUNDS", 1)
    group = step_products.read_group(spool, LAYERS, 1000)
    sample, _, _ = step_products.sample_of(step_products.Way(), group, tmp_path)
    rows = step_widths.measure(RATIO, group, sample)
    inflated = [row["inflated"] for row in rows]
    assert inflated == sorted(inflated, reverse=True)
    assert inflated[-1] < 0.95 * inflated[0]
    assert max(row["stored"] for row in rows) < 1.02 * min(row["stored"] for row in rows)


@pytest.mark.parametrize("names", [PAIRED, APART])
def test_choices_of_parts_meet_the_ratio(
    names: tuple[SectionName, ...], spool: Path, tmp_path: Path
) -> None:
    choice = next(choice for choice in step_choices.CHOICES["parts"] if choice.parts == 2)
    fitted = step_choices.fit_bases(spool, None, RATIO, tmp_path, names, choice)
    artifact = step_choices.artifact_of(choice, fitted, [RATIO])
    assert artifact.section_names == names
    assert all(bool((section.basis == 0).any()) for section in artifact.sections.values())


def test_bases_of_the_benchmark_of_products() -> None:
    whole, parts = basis_parts.bases(24, 12, 3, 3)
    assert int((whole == 0).sum()) == 0
    assert int((parts != 0).sum()) == 3 * 24 + 9 * 8
    assert torch.equal(parts[parts != 0], whole[parts != 0])
    row = basis_parts.measure(4, whole, parts)
    assert {"encode_faster", "decode_faster"} < set(row)
