"""A spool is captured once: used again, refused or made anew. The model's run is replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvtc_vllm.artifact.card import ArtifactCard, load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.calibration import calibrate as calibrate_module
from kvtc_vllm.calibration import capture as capture_module
from kvtc_vllm.calibration import gradients
from kvtc_vllm.calibration.calibrate import ArtifactSettings, calibrate, fit_spool
from kvtc_vllm.calibration.capture import CaptureSettings, capture_rows
from kvtc_vllm.calibration.capture_record import capturing
from kvtc_vllm.calibration.differentiable import CacheShape
from kvtc_vllm.calibration.documents import Text
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.gradients import Gradients, GradientSettings
from kvtc_vllm.calibration.sensitivity import load_sensitivity, save_sensitivity
from kvtc_vllm.calibration.sinks import SinkFit
from kvtc_vllm.calibration.spool import SpoolWriter
from kvtc_vllm.cli import main
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.nesting import nested_ratios
from tests.calibration.fitted import fill
from tests.calibration.test_sensitivity import FOUND
from tests.calibration.toy import HEADS, LAYERS, RATIOS, toy_header, toy_rope

FIT = ["--ratios", "2,4,8", "--simulation-rows", "512", "--layers-per-group", "2"]


Change = Callable[[CaptureSettings], CaptureSettings]


class Killed(RuntimeError):
    """The process ended in the middle of a capture."""


class Runs:
    """In the place of vLLM: leaves the toy model's spool, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.die = False

    def __call__(
        self, settings: CaptureSettings, texts: Sequence[Text], spool: Path
    ) -> tuple[int, str, str | None]:
        self.count += 1
        if self.die:
            SpoolWriter(spool / "rank0", toy_header(), (toy_rope(),))
            raise Killed
        fill(spool / "rank0")
        return 1500, settings.model, None


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    counting = Runs()
    monkeypatch.setattr(capture_module, "_run_model", counting)
    return counting


@pytest.fixture
def settings(tmp_path: Path) -> CaptureSettings:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "toy"}))
    (model / "tokenizer.json").write_text("{}")
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    return CaptureSettings(model=str(model), data=(str(text),), tokens=1200)


def test_the_same_settings_use_the_spool_again(
    runs: Runs, settings: CaptureSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    first = capture_rows(settings, tmp_path / "spool", said.append)
    assert (runs.count, said) == (1, [])
    # Another tensor-parallel size too: ranks are slices.
    for again in (settings, replace(settings, tp=2)):
        assert capture_rows(again, tmp_path / "spool", said.append) == first
    assert runs.count == 1
    assert "used again" in said[-1]
    assert first.model_name == "my-model"
    assert first.files == ("text.txt",)
    assert first.source.model == model_identity(settings.model).identity


def changed_text(settings: CaptureSettings) -> CaptureSettings:
    Path(settings.data[0]).write_text("other " * 100)
    return settings


def changed_model(settings: CaptureSettings) -> CaptureSettings:
    (Path(settings.model) / "config.json").write_text(json.dumps({"model_type": "other"}))
    return settings


def changed_tokenizer(settings: CaptureSettings) -> CaptureSettings:
    (Path(settings.model) / "tokenizer.json").write_text("[]")
    return settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: replace(s, tokens=900), "with tokens 1200, not 900"),
        (lambda s: replace(s, max_len=100), "with max_len 8192, not 100"),
        (lambda s: replace(s, seed=1), "with seed 0, not 1"),
        (lambda s: replace(s, sink_tokens=8), "with sink_tokens 4, not 8"),
        (lambda s: replace(s, heldout_fraction=0.2), "with heldout_fraction 0.1, not 0.2"),
        (lambda s: replace(s, engine={"dtype": "float16"}), "with engine {}, not {'dtype'"),
        (changed_text, "with texts"),
        (changed_model, "with model"),
        (changed_tokenizer, "with tokenizer"),
    ],
)
def test_other_settings_are_refused(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, change: Change, message: str
) -> None:
    capture_rows(settings, tmp_path / "spool")
    with pytest.raises(ArtifactError) as caught:
        capture_rows(change(settings), tmp_path / "spool")
    assert message in str(caught.value)
    assert "kvtc fit" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert runs.count == 1


def test_an_unfinished_capture_is_made_again(
    runs: Runs, settings: CaptureSettings, tmp_path: Path
) -> None:
    said: list[str] = []
    runs.die = True
    with pytest.raises(Killed):
        capture_rows(settings, tmp_path / "spool", said.append)
    with pytest.raises(ArtifactError, match="holds no finished capture"):
        fit_spool(tmp_path / "spool", ArtifactSettings(RATIOS, FitSettings()))
    runs.die = False
    capture_rows(settings, tmp_path / "spool", said.append)
    assert runs.count == 2
    assert ["captured anew" in line for line in said] == [True]


def test_two_processes_do_not_share_a_capture(
    runs: Runs, settings: CaptureSettings, tmp_path: Path
) -> None:
    with (
        capturing(tmp_path / "spool"),
        pytest.raises(ArtifactError, match="another process captures into it"),
    ):
        capture_rows(settings, tmp_path / "spool")
    assert runs.count == 0
    capture_rows(settings, tmp_path / "spool")


def test_calibrate_and_fit_make_the_same_artifact(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    made = ArtifactSettings(
        RATIOS,
        FitSettings(simulation_rows=512, seed=7),
        layers_per_group=2,
        out=str(tmp_path / "a"),
    )
    one = calibrate(replace(settings, seed=7), made, spool=str(spool))
    printed = capsys.readouterr().out
    assert "sections of 1200 rows by eigh, peak memory about" in printed
    assert "rank 0 V1: covariance" in printed
    assert main(["fit", str(spool), *FIT, "--out", str(tmp_path / "b")]) == 0
    two = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("artifact: "))
    assert one.name == two.name, "named by contents"
    assert two.parent.name == "my-model"
    card = load_rank_artifact(two, 0)[1]
    assert card.identity == model_identity(settings.model).identity
    assert (card.data.tokens, card.data.train_tokens, card.data.seed) == (1500, 1200, 7)
    assert runs.count == 1


def test_fit_for_more_ranks(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    capture_rows(settings, spool)
    # All layers together, or rows of one head are too short to be coded well.
    out = ["--out", str(tmp_path / "out"), "--layers-per-group", "all"]
    # Two heads on four ranks: the first two ranks hold copies of one head.
    assert main(["fit", str(spool), *FIT, *out, "--tp", "4", "--name", "four"]) == 0
    ranks = [load_rank_artifact(tmp_path / "out/my-model/four", rank) for rank in range(4)]
    for artifact, card, probe in ranks:
        assert artifact.geometry.num_kv_heads == 1
        assert card.tp_size == 4
        assert probe.k.shape[2] == 1
    prints = [artifact.fingerprint for artifact, _, _ in ranks]
    assert prints[0] == prints[1] != prints[2] == prints[3]
    assert main(["fit", str(spool), *FIT, *out, "--tp", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--tp 3: the model's {HEADS} KV heads do not divide among 3 ranks" in error


def test_fit_of_no_spool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tmp_path / "none")]) == 2
    assert "holds no finished capture" in capsys.readouterr().err
    (tmp_path / "capture.json").write_text("{}")
    assert main(["fit", str(tmp_path)]) == 2
    assert "capture.json: " in capsys.readouterr().err


def test_ordinary_tokens_are_the_default_where_sinks_are_protected(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = SinkRule((0, 2), -1.0)
    told = SinkFit(rule, 1.0, 0.1, train_share=0.0, heldout_share=0.0, documents=0.0)
    spool = tmp_path / "spool"
    record = capture_rows(settings, spool)
    source = msgspec.structs.replace(FOUND.source, model=record.source.model)
    save_sensitivity(spool / "sensitivity.json", msgspec.structs.replace(FOUND, source=source))

    def averaged(number: int, *more: str) -> str:
        out = tmp_path / str(number)
        assert main(["fit", str(spool), *FIT, "--ratios", "4", "--out", str(out), *more]) == 0
        (path,) = (path.parent for path in out.glob("*/*/card.json"))
        artifact, card, _ = load_rank_artifact(path, 0)
        gains.append(artifact.sections[0, artifact.section_names[-1]].plans[4.0].sink_gain)
        assert card.sensitivity is not msgspec.UNSET
        return card.sensitivity.averaged

    gains: list[float] = []

    assert averaged(0, "--codec", "kvtc2") == "all", "there are no sinks to protect"
    monkeypatch.setattr(calibrate_module, "fit_sinks", lambda _: told)
    assert averaged(1, "--codec", "kvtc2") == "ordinary"
    assert averaged(2, "--codec", "kvtc2", "--sensitivity-tokens", "all") == "all"
    assert averaged(3, "--codec", "kvtc2", "--sinks", "plain") == "all"
    assert averaged(4) == "all", "version 1 protects none"
    asked = averaged(5, "--codec", "kvtc2", "--sink-gain", "3")
    assert asked == "ordinary"
    # 60 % of the energy on 10 of 180 tokens: an error in one costs 25.5 times as much.
    assert gains == [pytest.approx(25.5**0.5)] * 4 + [1.0, 3.0]


def test_nested_plans_are_called_alike_on_all_ranks(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    capture_rows(settings, spool)
    fit = ["fit", str(spool), *FIT, "--ratios", "4", "--codec", "kvtc2", "--halvings", "2"]
    assert main([*fit, "--tp", str(HEADS), "--out", str(tmp_path / "out")]) == 0
    (path,) = (path.parent for path in (tmp_path / "out").glob("*/*/card.json"))
    artifacts = [load_rank_artifact(path, rank)[0] for rank in range(HEADS)]
    coarser = nested_ratios(artifacts[0])
    ratios = (4.0, coarser[4.0], coarser[coarser[4.0]])
    assert {artifact.ratios() for artifact in artifacts} == {ratios}
    assert all(nested_ratios(artifact) == coarser for artifact in artifacts)
    assert main([*fit, "--quality", "0.1", "--out", str(tmp_path / "other")]) == 2
    assert "--halvings 2 contradicts --quality 0.1" in capsys.readouterr().err


def test_fewer_first_positions_are_exact_if_asked(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    capture_rows(settings, spool)
    fit = ["fit", str(spool), *FIT, "--ratios", "4", "--out", str(tmp_path)]
    for asked, exact in (((), 4), (("--sink-tokens", "1"), 1), (("--sink-tokens", "0"), 0)):
        assert main([*fit, "--name", f"exact-{exact}", *asked]) == 0
        (path,) = tmp_path.glob(f"*/exact-{exact}")
        artifact, card, _ = load_rank_artifact(path, 0)
        assert artifact.sink_tokens == card.sink_tokens == exact
    assert main([*fit, "--sink-tokens", "256"]) == 2
    assert "--sink-tokens 256: give 0 to 255" in capsys.readouterr().err


def test_fit_uses_the_sensitivity_in_the_spool(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    record = capture_rows(settings, spool)
    source = msgspec.structs.replace(FOUND.source, model=record.source.model)
    found = msgspec.structs.replace(FOUND, source=source)

    def fitted(*more: str) -> ArtifactCard:
        arguments = ["fit", str(spool), *FIT, "--out", str(tmp_path / f"out{len(more)}"), *more]
        assert main(arguments) == 0
        name = capsys.readouterr().out.splitlines()[-1].removeprefix("artifact: ")
        card = load_card(Path(name))
        shutil.rmtree(name)
        return card

    plain = fitted()
    assert plain.sensitivity is msgspec.UNSET
    assert plain.sinks == (), "the toy's values have one mode"
    save_sensitivity(spool / "sensitivity.json", found)
    weighted = fitted()
    assert weighted.sensitivity is not msgspec.UNSET
    assert weighted.fingerprints != plain.fingerprints
    ordinary = fitted("--sensitivity-tokens", "ordinary")
    by_head = fitted("--sensitivity-metric", "head")
    prints = {card.fingerprints for card in (plain, weighted, ordinary, by_head)}
    assert len(prints) == 4
    for card, averaged, metric in ((ordinary, "ordinary", "layer"), (by_head, "all", "head")):
        assert card.sensitivity is not msgspec.UNSET
        assert (card.sensitivity.averaged, card.sensitivity.metric) == (averaged, metric)
    assert fitted("--sensitivity", "none").fingerprints == plain.fingerprints
    elsewhere = tmp_path / "mine.json"
    (spool / "sensitivity.json").rename(elsewhere)
    assert fitted("--sensitivity", str(elsewhere)).fingerprints == weighted.fingerprints
    save_sensitivity(elsewhere, FOUND)
    assert main(["fit", str(spool), "--sensitivity", str(elsewhere)]) == 2
    assert "mine.json: is of model c-d, the spool of" in capsys.readouterr().err


def test_no_capture_for_a_model_without_gradients(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", settings.model, "--data", *settings.data, "--out", str(tmp_path)]
    assert main([*command, "--sensitivity", "gradient"]) == 2
    error = capsys.readouterr().err
    assert "--sensitivity gradient: transformers cannot run my-model" in error
    assert error.rstrip().endswith("give --sensitivity probe or none")
    assert error.count("\n") == 1
    assert runs.count == 0


def test_calibrate_measures_before_it_fits(
    runs: Runs, settings: CaptureSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients themselves are in test_gradients; here what is made of them."""
    monkeypatch.setattr(gradients, "check_supported", lambda *_, **__: None)

    def measured(
        _: Path,
        __: object,
        groups: Sequence[tuple[CacheShape, object]],
        source: Any,
        **___: Any,
    ) -> Any:
        ((shape, _rule),) = groups
        assert (shape.layers, shape.kv_heads) == (len(FOUND.all_tokens.keys), HEADS)
        return [msgspec.structs.replace(FOUND, source=source)]

    monkeypatch.setattr(gradients, "measure_sensitivity", measured)
    made = ArtifactSettings(
        RATIOS, FitSettings(simulation_rows=512), layers_per_group=2, out=str(tmp_path / "a")
    )
    spool = tmp_path / "spool"
    measure = Gradients(settings, GradientSettings(), "cpu")
    one = calibrate(settings, made, spool=str(spool), sensitivity=measure)
    assert load_card(one).sensitivity is not msgspec.UNSET
    left = load_sensitivity(spool / "sensitivity.json", LAYERS, HEADS)
    assert left.all_tokens == FOUND.all_tokens
    two = calibrate(settings, replace(made, out=str(tmp_path / "b")), spool=str(spool))
    assert load_card(two).sensitivity is msgspec.UNSET


@pytest.mark.parametrize(
    ("free", "tp", "share"), [(0.85, 1, 0.68), (0.85, 2, 0.34), (1.0, 1, 0.8), (0.1, 1, 0.08)]
)
def test_an_engine_on_a_cpu_asks_for_no_more_memory_than_is_free(
    monkeypatch: pytest.MonkeyPatch, free: float, tp: int, share: float
) -> None:
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("vllm")
    memory = SimpleNamespace(total=1000, available=1000 * free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert capture_module.engine_memory(tp) == {"gpu_memory_utilization": pytest.approx(share)}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert capture_module.engine_memory(tp) == {}
