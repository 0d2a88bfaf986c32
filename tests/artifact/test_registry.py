from __future__ import annotations

import json
import logging
import pwd
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import load_card, ratio_within
from kvtc_vllm.artifact.identity import ModelIdentity
from kvtc_vllm.artifact.registry import find, search_path
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.toy import IDENTITY, RATIOS

OTHER_WEIGHTS = ModelIdentity(IDENTITY.config, "e" * 32)
OTHER_CONFIG = ModelIdentity("e" * 32, IDENTITY.weights)
OTHER_MODEL = ModelIdentity("e" * 32, "f" * 32)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No artifact of the machine or the source tree takes part."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("KVTC_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "shipped_registry", lambda: tmp_path / "shipped")


def place(written: Path, root: Path, name: str, **changes: Any) -> Path:
    """A copy of the artifact in a registry, with fields of its card changed."""
    target = root / "org--toy" / name
    target.mkdir(parents=True)
    card = json.loads((written / "card.json").read_text()) | changes
    (target / "card.json").write_text(json.dumps(card))
    return target


def look(
    identity: ModelIdentity = IDENTITY, tp: int = 1, ratio: float | None = 4.0, **more: Any
) -> Path:
    return find(identity, tp, ratio, model_name="org/toy", **more)


def refusal(**arguments: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        look(**arguments)
    return str(caught.value)


def test_newest_match_wins(written: Path, tmp_path: Path) -> None:
    root = tmp_path / "user" / "kvtc" / "calibrations"
    place(written, root, "b-old", created="2026-01-01T00:00:00+00:00")
    newest = place(written, root, "a-new", created="2026-03-01T00:00:00+00:00")
    place(
        written,
        root,
        "c-other-tp",
        created="2026-04-01T00:00:00+00:00",
        tp_size=2,
        fingerprints=["0", "1"],
    )
    assert look() == newest


def test_search_order(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTC_REGISTRY", f"{tmp_path / 'env1'}:{tmp_path / 'env2'}")
    configured = [tmp_path / "configured"]
    roots = search_path(configured)
    names = ["configured", "env1", "env2", "calibrations", "shipped"]
    assert [path.name for path in roots] == names
    # Later registries hold newer artifacts; the earlier registry is still preferred.
    for year, root in reversed(list(enumerate(roots, start=2026))):
        expected = place(written, root, "x", created=f"{year}-01-01T00:00:00+00:00")
        assert look(registries=configured) == expected


def test_a_user_without_a_home_has_no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no file knows."""

    def nobody(number: int) -> Any:
        raise KeyError(number)

    for name in ("HOME", "XDG_DATA_HOME", registry.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert search_path() == [registry.shipped_registry()]


def test_each_directory_once(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    assert search_path([shipped, shipped]).count(shipped) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"identity": OTHER_WEIGHTS}, "same configuration, other weights"),
        ({"identity": OTHER_CONFIG}, "same weights, other configuration"),
        ({"identity": OTHER_MODEL}, "another model"),
        ({"tp": 2}, "calibrated for TP 1, this is TP 2"),
        ({"ratio": 12.0}, "no plan for 12x, only 2x, 4x, 8x"),
        (
            {"tp": 4, "ratio": 99.0},
            "calibrated for TP 1, this is TP 4; no plan for 99x, only 2x, 4x, 8x",
        ),
    ],
)
def test_refusal_says_why(
    written: Path, tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    place(written, tmp_path / "shipped", "x")
    message = refusal(**arguments)
    assert reason in message
    assert arguments.get("identity", IDENTITY).identity in message
    assert f"identity {IDENTITY.identity}, TP 1, 2x, 4x, 8x" in message
    assert f"searched {tmp_path / 'shipped'}" in message
    assert f"searched {tmp_path / 'user' / 'kvtc' / 'calibrations'} (does not exist)" in message
    tp = arguments.get("tp", 1)
    assert f"kvtc calibrate org/toy --data TEXT_FILES --tp {tp}" in message


def curve(*kls: float) -> dict[str, Any]:
    points = [
        {"ratio": ratio, "real_ratio": ratio, "kl": kl, "low": kl, "high": kl}
        for ratio, kl in zip(RATIOS, kls, strict=True)
    ]
    tokens = {"prefix_tokens": 768, "exact_tokens": 128, "scored_tokens": 128, "chunk_tokens": 128}
    return {"documents": [4, 9], "points": points} | tokens


def test_an_artifact_is_found_by_quality(written: Path, tmp_path: Path) -> None:
    plain = place(written, tmp_path / "shipped", "plain")
    message = refusal(ratio=None, quality=0.002)
    assert f"{plain}: no measured curve of quality; --quality-curve measures one" in message
    assert message.endswith("--tp 1 --quality-curve")
    measured = place(written, tmp_path / "shipped", "measured", curve=curve(0.0005, 0.002, 0.009))
    assert look(ratio=None, quality=0.002) == measured
    place(
        written,
        tmp_path / "shipped",
        "newer-worse",
        curve=curve(0.0005, 0.003, 0.009),
        created="2099-01-01T00:00:00+00:00",
    )
    assert look(ratio=None, quality=0.002) == measured
    assert look(ratio=None, quality=0.0005).name == "newer-worse"
    assert ratio_within(load_card(measured), 0.002) == 4.0
    assert ratio_within(load_card(measured), 1.0) == 8.0
    message = refusal(ratio=None, quality=0.0001)
    assert "TP 1, quality 0.0001)" in message
    assert "no plan with a KL of at most 0.0001, the best is 2x: 0.0005" in message


def test_a_curve_of_other_ratios_is_refused(written: Path, tmp_path: Path) -> None:
    other = place(written, tmp_path, "x", ratios=[2.0, 4.0], curve=curve(0.1, 0.2, 0.3))
    with pytest.raises(ArtifactError, match=r"curve is of ratios \(2.0, 4.0, 8.0\), the plans of"):
        load_card(other)


def test_refusal_with_nothing_there() -> None:
    assert "found no artifact at all" in refusal()


def test_long_lists_are_cut_nearest_first(written: Path, tmp_path: Path) -> None:
    for i in range(30):
        place(written, tmp_path / "shipped", f"x{i}", config_fingerprint=f"{i}", identity="other")
    place(written, tmp_path / "shipped", "z-near")
    message = refusal(tp=2)
    assert "and 11 more" in message
    assert message.splitlines()[1].endswith("z-near: calibrated for TP 1, this is TP 2")


def test_broken_cards_are_skipped_with_a_warning(
    written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "shipped" / "org--toy" / "broken"
    broken.mkdir(parents=True)
    (broken / "card.json").write_text("{}")
    good = place(written, tmp_path / "shipped", "good")
    with caplog.at_level(logging.WARNING):
        assert look() == good
    assert str(broken) in caplog.text


def test_unfinished_directories_are_not_seen(written: Path, tmp_path: Path) -> None:
    place(written, tmp_path / "shipped", ".writing-abc")
    assert "found no artifact at all" in refusal()


def test_explicit_artifact(written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert look(artifact=written) == written
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    message = refusal(artifact=copy, tp=2)
    assert f"artifact {copy} (org/toy) does not fit org/toy: calibrated for TP 1" in message
    assert "kvtc calibrate org/toy" in message
    assert "other configuration" in refusal(artifact=copy, identity=OTHER_CONFIG)
    with caplog.at_level(logging.WARNING):
        assert look(artifact=copy, identity=OTHER_WEIGHTS) == copy
    assert "other weights" in caplog.text
    assert "not an artifact" in refusal(artifact=tmp_path / "nowhere")


def test_shipped_registry_is_in_the_source_tree_or_the_wheel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert registry.shipped_registry().name in ("calibrations", "_calibrations")
