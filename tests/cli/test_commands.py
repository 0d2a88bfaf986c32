"""`kvtc inspect` and `kvtc doctor`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kvtc_vllm.artifact.card import CurveCard, CurvePoint, load_card, save_card
from kvtc_vllm.artifact.directory import checksum, load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.rank_file import rank_file_name, write_rank_file
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.cli import doctor, main
from kvtc_vllm.cli.checks import Checks
from kvtc_vllm.cli.doctor import _round_trip

SHIPPED = sorted(
    path.parent for path in (Path(__file__).parents[2] / "calibrations").rglob("card.json")
)
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.kvtc"))


@pytest.mark.parametrize("blob", GOLDEN, ids=lambda p: p.stem)
def test_inspect_describes_every_golden_blob(
    blob: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(blob), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["codec"] in ("raw", "kvtc", "kvtc2")
    assert described["stored_bytes"] == blob.stat().st_size
    assert described["ratio"] == round(described["raw_bytes"] / described["stored_bytes"], 2)
    assert main(["inspect", str(blob)]) == 0
    assert "sections:" in capsys.readouterr().out


def test_inspect_refuses_a_damaged_blob(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(GOLDEN[0].read_bytes())
    content[-1] ^= 1
    path = tmp_path / "bad.kvtc"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    assert "checksum" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_inspect_describes_the_shipped_artifact(
    reference_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = find(model_identity(reference_model), 1, 16.0, model_name="reference")
    assert main(["inspect", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "heldout error" in printed
    assert "group 0 K" in printed


def test_doctor_finds_the_model_s_artifact_and_measures(
    reference_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(reference_model)]) == 0
    printed = capsys.readouterr().out
    for words in ("ok   match", "ok   round trip", "MB/s", "ok   plugin", "supported range"):
        assert words in printed
    assert "info serve       kvtc config kvtc-16x\n" in printed


def test_doctor_says_of_sparse_attention_what_an_engine_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_topk": 2048}
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, **config}))
    assert main(["doctor", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line[5:].startswith("layers")]
    assert line.startswith("BAD")
    assert "index_topk: caches of sparse attention are refused" in line
    assert "net ratio" not in printed


def test_doctor_says_with_which_codec_an_engine_takes_the_artifact(
    reference_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine asks for one codec, and the one that an artifact is of may not be the default."""
    monkeypatch.setattr(doctor, "_round_trips", lambda *arguments: None)
    command = ["doctor", str(reference_model)]
    assert main([*command, "--codec", "kvtc2"]) == 1
    assert "this is kvtc2; codec='kvtc' serves it" in capsys.readouterr().out
    assert main([*command, "--codec", "kvtc", "--ratio", "64"]) == 0
    assert "kvtc config kvtc-16x ratio=64\n" in capsys.readouterr().out


@pytest.mark.parametrize("artifact", SHIPPED, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_doctor_holds_every_shipped_artifact_against_what_it_promises(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = Checks(as_json=False)
    _round_trip(artifact, load_card(artifact).ratios[0], checks)
    assert "ok   round trip" in capsys.readouterr().out


def test_doctor_tells_an_artifact_that_loses_more_than_it_promises(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Rows of a layer in another's place: every checksum is right."""
    original, _, probe = load_rank_artifact(SHIPPED[0], 0)
    damaged = tmp_path / SHIPPED[0].name
    shutil.copytree(SHIPPED[0], damaged)
    swapped = replace(probe, v=probe.v.flip(1))
    name = rank_file_name(0, 1)
    write_rank_file(damaged / name, original, swapped, 0, 1)
    card = load_card(damaged)
    save_card(damaged, msgspec.structs.replace(card, checksums={name: checksum(damaged / name)}))
    checks = Checks(as_json=False)
    _round_trip(damaged, 16.0, checks)
    assert "BAD  round trip" in capsys.readouterr().out


def test_doctor_holds_every_rank_s_part_against_what_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine loads them all, and one that is damaged does not start."""
    (shipped,) = [path for path in SHIPPED if load_card(path).tp_size == 2]
    place = tmp_path / "model" / "artifact"
    shutil.copytree(shipped, place)
    monkeypatch.setattr(doctor, "_environment", lambda checks: None)
    command = ["doctor", "--registry", str(tmp_path), "--ratio", "16"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "ok   round trip  artifact at 16x, rank 0: " in printed
    assert "ok   round trip  artifact at 16x, rank 1: " in printed
    second = place / rank_file_name(1, 2)
    second.write_bytes(second.read_bytes()[:-1])
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "ok   round trip  artifact at 16x, rank 0: " in printed
    assert "BAD  round trip" in printed
    assert second.name in printed


def test_doctor_says_which_ratio_a_quality_is(
    reference_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = find(model_identity(reference_model), 1, 16.0, model_name="reference")
    own = tmp_path / "model" / "curved"
    shutil.copytree(shipped, own)
    card = load_card(own)
    points = tuple(
        CurvePoint(ratio=ratio, real_ratio=ratio, kl=kl, low=kl, high=kl)
        for ratio, kl in zip(card.ratios, (0.0001, 0.001, 0.01, 0.1, 1.0), strict=False)
    )
    wanted = points[1].ratio
    curve = CurveCard(
        documents=(3,),
        prefix_tokens=768,
        exact_tokens=128,
        scored_tokens=128,
        chunk_tokens=128,
        points=points,
    )
    save_card(own, msgspec.structs.replace(card, curve=curve))
    command = ["doctor", str(reference_model), "--registry", str(tmp_path)]
    assert main([*command, "--quality", "0.002"]) == 0
    printed = capsys.readouterr().out
    assert f"0.002 is {wanted:g}x of curved" in printed
    assert f"curved at {wanted:g}x, rank 0: " in printed
    assert main([*command, "--quality", "0.00001"]) == 1
    assert "no plan with a KL of at most 1e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model", "--quality", "0"], "--quality 0: give a KL above 0"),
        (["model", "--quality", "0.1", "--ratio", "8"], "contradict each other"),
        (["--quality", "0.1"], "give a MODEL"),
        (["http://localhost:1", "--quality", "0.1"], "give a MODEL"),
    ],
)
def test_doctor_refuses_a_quality_that_says_nothing(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_doctor_says_what_is_missing(
    reference_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(reference_model), "--tp", "3"]) == 1
    printed = capsys.readouterr().out
    assert "BAD  match" in printed
    assert "kvtc calibrate" in printed
    assert "--tp 3" in printed


@pytest.mark.parametrize(
    ("command", "extra"),
    [(["calibrate", "M", "--data", "D"], "calibrate"), (["eval", "M"], "eval")],
)
def test_a_command_says_which_extra_is_missing(
    command: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    present = {"constriction", "tqdm"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in present or None)
    assert main(command) == 2
    expected = f"kvtc {extra} needs matplotlib: pip install 'kvtc-vllm[{extra}]'"
    assert capsys.readouterr().err.splitlines() == [f"kvtc {extra}: {expected}"]
