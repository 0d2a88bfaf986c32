"""`kvtc eval`: what it refuses, and what each ablation compares."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.cli import main
from kvtc_vllm.cli.eval import DEFAULT_METHODS, _defaults, _shown, add_arguments
from kvtc_vllm.evaluation import ablations, methods
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.methods import MethodError
from kvtc_vllm.evaluation.recall import RECALLS
from kvtc_vllm.evaluation.tasks import DATA_TASKS, Source
from tests.evaluation.public_data import write_public_data


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
        (["--ablation", "layers"], ["--calibration-data", "--spool"]),
        (["--quick", "--ablation", "sinks"], ["--quick", "--ablation"]),
        (["--spool", "nowhere"], ["--spool 'nowhere'", "kvtc calibrate --spool"]),
        (["--methods", "h2o/keep=2"], ["'h2o/keep=2'", "keep=2", "from"]),
        (["--methods", "h2o/colour=2"], ["no setting 'colour'", "keep, recent"]),
        (["--methods", "fp8-e4m3/bits=2"], ["no setting 'bits'", "it has none"]),
        (["--methods", "h2o/keep"], ["'keep' is no setting", "keep=0.25"]),
        (["--methods", "h2o/keep=nan"], ["'keep=nan' is no setting"]),
        (["--methods", "snapkv/pooling=4"], ["pooling=4 is even", "odd"]),
        (["--methods", "h2o+kivi-2bit"], ["'h2o+kivi-2bit'", "kvtc-<ratio>x"]),
        (["--methods", "clusterkv+kvtc-8x"], ["'clusterkv+kvtc-8x'", "chunkkv", "single chunks"]),
        (["--methods", "gear-2bit+kvtc-8x"], ["'gear-2bit+kvtc-8x'", "single chunks"]),
        (["--methods", "swan-8bit+kvtc-8x"], ["'swan-8bit+kvtc-8x'", "fit nothing"]),
        (["--methods", "kvtc-8x@mine"], ["'kvtc-8x@mine'", "--artifact mine=DIR"]),
        (["--methods", "lorc", "--calibration-data", "none"], ["--calibration-data", "none"]),
        (["--artifact", "a=x", "--artifact", "a=y"], ["--artifact 'a=y'", "'x'", "NAME=DIR"]),
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
    generated, public = (
        ablations.plan(*arguments, source=source) for source in (None, Source("data", "report"))
    )
    assert [method for method, _ in generated] == [method for method, _ in public]
    for (_, ours), (_, theirs) in zip(generated, public, strict=True):
        assert [ablations.ON_DATA[w.task] for w in ours] == [w.task for w in theirs]
        assert [w.context for w in ours] == [w.context for w in theirs]
        assert {w.task for w in theirs} <= DATA_TASKS.keys()


def test_an_ablation_of_some_tasks(reference_model: Path, tmp_path: Path) -> None:
    arguments = ("sinks", str(reference_model), None, (), 4, 800, {}, tmp_path)
    whole, part = ablations.plan(*arguments), ablations.plan(*arguments, only=["needle"])
    assert [method for method, _ in part] == [method for method, _ in whole]
    for (_, every), (_, some) in zip(whole, part, strict=True):
        assert [w for w in every if w.task == "needle"] == some
    with pytest.raises(MethodError, match="no task chats; it has prose"):
        ablations.plan(*arguments, only=["chats"])


def test_results_show_no_directories_of_the_machine() -> None:
    shown = _shown(["eval", "/home/me/models/small", "--tasks", "litm:512", "--out", "here/it"])
    assert shown == "kvtc eval small --tasks litm:512 --out here/it"
    named = _shown(["eval", "small", "--artifact", "mine=/home/me/registry/small/tp1-all"])
    assert named == "kvtc eval small --artifact mine=tp1-all"


def test_artifacts_have_names() -> None:
    artifacts = {"": "first", "mine": "second"}
    plain, named = (methods.find(name, artifacts) for name in ("kvtc-8x", "kvtc-8x@mine"))
    assert (plain.name, plain.artifact) == ("kvtc-8x", "first")
    assert (named.name, named.artifact, named.ratio) == ("kvtc-8x mine", "second", 8.0)


def test_layers_are_parted_whatever_their_number() -> None:
    assert ablations.layer_counts(8) == [None, 4, 2, 1]
    assert ablations.layer_counts(30) == [None, 15, 10, 5, 1]
    assert ablations.layer_counts(2) == [None, 1]


def test_what_a_domain_is_fitted_on_is_not_reported_on(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(str(write_public_data(tmp_path / "data")), "report")
    captured: list[str] = []

    def capture(model: str, data: list[str], *_: object) -> Path:
        captured.append(Path(data[0]).read_text())
        return tmp_path / "rank0"

    monkeypatch.setattr(ablations, "capture", capture)
    monkeypatch.setattr(ablations, "refit", lambda spool, out, ratios, **_: out)
    ablations.plan(
        "domain", str(reference_model), None, (), 4, 800, {}, tmp_path / "work", source=source
    )
    assert len(captured) == 2
    for text, name in zip(captured, ("essays", "library"), strict=True):
        reported = [document.content["text"] for document in source.documents(name)]
        assert text
        assert not any(document in text for document in reported)


def test_methods_have_settings_and_go_below_our_codec() -> None:
    plain = methods.find("snapkv/keep=0.5")
    assert (plain.name, plain.tokens, plain.settings) == (
        "snapkv/keep=0.5",
        "snapkv",
        {"keep": 0.5},
    )
    assert plain.plan.endswith("; keep 0.5")
    coded = methods.find("snapkv/keep=0.5+kvtc2-16x@mine", {"mine": "there"})
    assert coded.name == "snapkv/keep=0.5+kvtc2-16x mine"
    assert (coded.tokens, coded.codec, coded.ratio) == ("snapkv", "kvtc2", 16.0)
    assert (coded.artifact, coded.settings) == ("there", {"keep": 0.5})
    assert coded.can_share(methods.find("clusterkv"))
    below = methods.find("fp8-e4m3+kvtc-8x")
    assert (below.below, below.tokens, below.ratio) == ("fp8-e4m3", None, 8.0)
    assert below.can_share(methods.find("kvtc-8x"))
    assert methods.find("kvtc-8x@a+b/c", {"a+b/c": "there"}).artifact == "there"
    assert methods.find("deltakv/stride=5").override["settings"] == {"stride": 5}


def test_quick_is_every_method_unless_one_is_given(reference_model: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(reference_model), "--quick"])
    _defaults(args)
    chosen = [methods.find(name) for name in args.methods.split(",")]
    assert {method.tokens for method in chosen if method.tokens} == {*EVICTIONS, *RECALLS}
    stored = {method.override.get("baseline") for method in chosen}
    assert {*BASELINES} - stored == {"cachegen-lmcache"}
    assert any(method.below for method in chosen)
    assert any(method.tokens and method.ratio for method in chosen)
    ours = [name for name in args.methods.split(",") if name.startswith("kvtc")]
    assert ours == ["kvtc-8x", "kvtc-16x", "kvtc-32x"]
    assert (args.count, args.share_exact) == (4, True)
    given = parser.parse_args(["M", "--quick", "--methods", "h2o", "--count", "9", "--data", "D"])
    _defaults(given)
    assert (given.methods, given.count, given.tasks) == ("h2o", 9, "essays:400,kv-retrieval:416")
    plain = parser.parse_args(["M"])
    _defaults(plain)
    assert (plain.methods, plain.count, plain.tasks) == (DEFAULT_METHODS, 32, "all")
    assert not plain.share_exact


def test_quick_takes_our_codecs_as_artifacts_have_them(
    reference_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped = registry.find(model_identity(reference_model), 1, 8, model_name="M")
    card = json.loads((shipped / "card.json").read_text())
    other = {**card, "codec": "kvtc2", "ratios": [16.0]}
    (tmp_path / "card.json").write_text(json.dumps(other))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_args([str(reference_model), "--quick", "--artifact", str(tmp_path)])
    _defaults(given)
    names = given.methods.split(",")
    assert [name for name in names if name.startswith("kvtc")] == ["kvtc2-16x"]
    assert {"fp8-e4m3+kvtc2-16x", "snapkv/keep=0.5+kvtc2-16x"} <= {*names}
    monkeypatch.setattr(registry, "search_path", lambda configured: [])
    without = parser.parse_args([str(reference_model), "--quick"])
    _defaults(without)
    assert "kvtc" not in without.methods
    assert "8x, 16x, 32x: our codecs are left out" in capsys.readouterr().out
