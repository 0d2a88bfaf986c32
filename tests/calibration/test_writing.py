from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.calibration import writing
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.calibration.report import write_report
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.writing import Description, model_slug, write_artifact
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.toy import DATA, IDENTITY, RANK_FILE

DESCRIPTION = Description("org/toy", IDENTITY, "bfloat16", DATA)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take seconds, and `written` has them."""
    monkeypatch.setattr(writing, "write_report", lambda *_: None)


def test_directory_layout(written: Path) -> None:
    assert written.parent.name == "org--toy"
    assert written.name.startswith("tp1-2-")
    names = sorted(path.name for path in written.iterdir())
    assert names == ["card.json", RANK_FILE, "report.md", "report.png"]
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    report = (written / "report.md").read_text()
    assert "| 0 | K group 1 | 32 |" in report
    assert (written / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len({path.stat().st_mode & 0o444 for path in written.iterdir()}) == 1


@pytest.mark.usefixtures("no_report")
def test_two_ranks(fit: RankFit, reader: SpoolReader, tmp_path: Path) -> None:
    directory = write_artifact(
        tmp_path, DESCRIPTION, [fit, fit], [reader.probe(), reader.probe(5)], name="mine"
    )
    assert directory == tmp_path / "org--toy" / "mine"
    assert load_card(directory).tp_size == 2
    assert len(load_rank_artifact(directory, 1)[2].positions) == 5
    with pytest.raises(ArtifactError, match=r"ranks 0\.\.1, not 2"):
        load_rank_artifact(directory, 2)


@pytest.mark.usefixtures("no_report")
def test_existing_directory(fit: RankFit, reader: SpoolReader, tmp_path: Path) -> None:
    arguments: tuple[Any, ...] = (tmp_path, DESCRIPTION, [fit], [reader.probe()])
    directory = write_artifact(*arguments)
    with pytest.raises(ArtifactError, match="exists already"):
        write_artifact(*arguments)
    (directory / "old").touch()
    assert write_artifact(*arguments, overwrite=True) == directory
    assert not (directory / "old").exists()
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_refused_artifact_leaves_nothing(fit: RankFit, reader: SpoolReader, tmp_path: Path) -> None:
    sections = dict(fit.artifact.sections)
    sections[0, "v"] = dataclasses.replace(sections[0, "v"], heldout_error={})
    bad = dataclasses.replace(fit, artifact=dataclasses.replace(fit.artifact, sections=sections))
    with pytest.raises(ArtifactError, match="v0"):
        write_artifact(tmp_path, DESCRIPTION, [bad], [reader.probe()])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing(
    fit: RankFit, reader: SpoolReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(writing, "write_report", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_artifact(tmp_path, DESCRIPTION, [fit], [reader.probe()])
    assert list(tmp_path.iterdir()) == []


def test_slug_is_one_path_component() -> None:
    assert model_slug("meta-llama/Llama-3.1-8B") == "meta-llama--Llama-3.1-8B"
    assert model_slug("../../etc") == "etc"
    assert model_slug("///") == "model"


@pytest.mark.parametrize(
    ("directory", "made_by"), [("written", "fit"), ("written_pairs", "paired_fit")]
)
def test_no_panel_of_the_picture_is_empty(
    directory: str,
    made_by: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A pair has one allocation to show, not two."""
    fit: RankFit = request.getfixturevalue(made_by)
    card = load_card(request.getfixturevalue(directory))
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    write_report(tmp_path, card, [fit])
    (figure,) = figures
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 2 + len(fit.artifact.section_names)
    assert all(axes.has_data() for axes in shown)
