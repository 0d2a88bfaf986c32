"""`kvtc eval`: what it refuses, and what each ablation compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.cli.eval import _shown
from kvtc_vllm.evaluation import ablations
from kvtc_vllm.evaluation.methods import MethodError
from kvtc_vllm.evaluation.tasks import DATA_TASKS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "riddles"], ["riddles", "litm", "multi-turn"]),
        (["--methods", "zip"], ["zip", "kivi-2bit", "h2o"]),
        (["--tasks", "essays"], ["essays", "--data DIR"]),
        (["--tasks", "litm:4"], ["--tasks '4'", "at least 64"]),
        (["--data", "nowhere"], ["--data 'nowhere'", "not a directory"]),
        (["--part", "calibrate"], ["--part 'calibrate'", "'tune' or 'report'"]),
        (["--lengths", "many"], ["many", "512,1024"]),
        (["--lengths", "8"], ["8", "at least 64"]),
        (["--engine", "{"], ["--engine", "JSON"]),
        (["--ablation", "colour"], ["colour", "sinks", "rope"]),
        (["--ablation", "layers"], ["--calibration-data"]),
    ],
)
def test_refusals_name_the_value_and_what_is_right(
    reference_model: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    assert main(["eval", str(reference_model), *arguments]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_ablations_are_listed(reference_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(reference_model), "--ablation", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ablations.ABLATIONS)


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_changes_one_thing(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Methods have names of their own, tasks, and an artifact; fits are not made here."""
    monkeypatch.setattr(ablations, "capture", lambda *_: tmp_path / "rank0")
    monkeypatch.setattr(ablations, "refit", lambda spool, out, ratios, **_: out)
    plan = ablations.plan(
        name, str(reference_model), None, ["text"], 4, 1024, {"block_size": 32}, tmp_path
    )
    assert len(plan) >= 4
    described = [(method, tuple(workloads)) for method, workloads in plan]
    labels = [(method.name, workloads) for method, workloads in described]
    assert len(set(map(str, labels))) == len(labels)
    for method, workloads in described:
        assert workloads
        assert method.override["artifact"]
        assert method.connector_config(method.chunk_tokens)["recent_window"] == method.window


def test_an_ablation_that_fits_needs_data(reference_model: Path, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="calibration-data"):
        ablations.plan("rope", str(reference_model), None, (), 4, 1024, {}, tmp_path)


def test_keys_and_values_divide_one_budget(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "capture", lambda *_: tmp_path / "rank0")
    fitted: list[float] = []
    monkeypatch.setattr(
        ablations, "refit", lambda spool, out, ratios, **_: fitted.extend(ratios) or out
    )
    plan = ablations.plan("keys-values", str(reference_model), None, ("x",), 4, 1024, {}, tmp_path)
    divided = [(m.override["ratio"], m.override["options"]) for m, _ in plan]
    assert {single for _, pair in divided for single in pair.values()} <= set(fitted)
    for ratio in (16.0, 32.0):
        assert (ratio, {"k": ratio, "v": ratio}) in divided
    for ratio, pair in divided:
        assert 1 / pair["k"] + 1 / pair["v"] == pytest.approx(2 / ratio)


def test_ablations_ask_the_same_of_public_documents(reference_model: Path, tmp_path: Path) -> None:
    arguments = ("sinks", str(reference_model), None, (), 4, 800, {}, tmp_path)
    generated, public = (ablations.plan(*arguments, public=on) for on in (False, True))
    assert [method for method, _ in generated] == [method for method, _ in public]
    for (_, ours), (_, theirs) in zip(generated, public, strict=True):
        assert [ablations.ON_DATA[w.task] for w in ours] == [w.task for w in theirs]
        assert [w.context for w in ours] == [w.context for w in theirs]
        assert {w.task for w in theirs} <= DATA_TASKS.keys()


def test_results_show_no_directories_of_the_machine() -> None:
    shown = _shown(["eval", "/home/me/models/small", "--tasks", "litm:512", "--out", "here/it"])
    assert shown == "kvtc eval small --tasks litm:512 --out here/it"
