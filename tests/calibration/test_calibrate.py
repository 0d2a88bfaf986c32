"""`kvtc calibrate` from end to end: a model in vLLM, its rows, an artifact, a server with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.registry import find
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.cli import main
from tests.connector.engine import engine, greedy, metrics, texts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE = (
    '{"block_size": 32, "max_model_len": 1024, "num_gpu_blocks_override": 128, '
    '"max_num_batched_tokens": 512, "dtype": "float32"}'
)


def test_calibrate_in_layer_groups_then_serve(
    reference_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(reference_model.parent))
    import data

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(data.texts("train", "mix", characters=60_000)))
    out, spool = tmp_path / "registry", tmp_path / "spool"
    arguments = ["calibrate", str(reference_model), "--data", str(text), "--out", str(out)]
    arguments += ["--tokens", "5000", "--max-len", "900", "--layers-per-group", "4"]
    arguments += ["--ratios", "4,8", "--key-share", "0.4"]
    arguments += ["--spool", str(spool), "--engine", ENGINE]
    assert main(arguments) == 0

    # Again: from the spool, without the engine, with the same outcome.
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert "used again" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "again").glob("*/*")] == [
        path.name for path in out.glob("*/*")
    ]

    reader = SpoolReader(spool / "rank0")
    assert reader.header.total_kv_heads == reader.geometry.num_kv_heads
    assert int(reader.positions.min()) >= 4, "sinks must be left out"
    assert 4000 <= reader.count(heldout=False) <= 6000
    assert not set(reader.docs[reader.heldout].tolist()) & set(
        reader.docs[~reader.heldout].tolist()
    )

    directory = find(
        model_identity(reference_model), 1, 8.0, model_name="reference", registries=[out]
    )
    assert directory.is_relative_to(out)
    assert (directory / "report.png").stat().st_size > 10_000
    artifact, card, _ = load_rank_artifact(directory, 0)
    assert artifact.geometry.layer_groups == ((0, 4), (4, 8))
    assert card.data.files == ("text.txt",)
    assert card.key_share == 0.4
    for section in artifact.sections.values():
        assert section.heldout_error[4.0] < section.heldout_error[8.0] < 0.2
        columns = section.basis.float()
        defect = (columns.T @ columns - torch.eye(columns.shape[1])).abs().max()
        assert float(defect) < 2e-3

    extra = {"codec": "kvtc", "ratio": 8, "registry": [str(out)], "memory_bytes": "64MiB"}
    check_reload(reference_model, extra)


def check_reload(model: Path, extra: dict[str, Any]) -> None:
    """What the engine's own cache has lost comes back from the tier, all of it."""
    prompts = texts(model, count=2, tokens=700)
    with engine(model, extra) as llm:
        greedy(llm, prompts, 8)
        assert llm.reset_prefix_cache()
        greedy(llm, prompts, 8)
        values = metrics(llm)
    assert values["kvtc_loaded_tokens"] == values["external_prefix_cache_hits"] == 2 * 544
    assert not any(v for k, v in values.items() if k.startswith("kvtc_failed_loads"))


def test_calibrate_by_gradients_then_serve(reference_model: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(reference_model.parent))
    import data

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(data.texts("train", "mix", characters=40_000)))
    arguments = ["calibrate", str(reference_model), "--data", str(text), "--ratios", "4,8"]
    arguments += ["--tokens", "3000", "--max-len", "900", "--sensitivity", "gradient"]
    arguments += ["--out", str(tmp_path / "registry"), "--engine", ENGINE]
    assert main(arguments) == 0
    (directory,) = (tmp_path / "registry").glob("*/*")
    artifact, card, _ = load_rank_artifact(directory, 0)
    assert card.sensitivity is not msgspec.UNSET
    assert len(card.sensitivity.key_weights) == artifact.geometry.num_layers
    for (_, kind), section in artifact.sections.items():
        assert section.weights is not None
        found = section.weights.view(artifact.geometry.num_layers, -1)
        weights = card.sensitivity.key_weights if kind == "k" else card.sensitivity.value_weights
        assert found[:, 0].tolist() == pytest.approx(list(weights))
    extra = {"codec": "kvtc", "ratio": 8, "registry": [str(tmp_path / "registry")]}
    check_reload(reference_model, extra | {"memory_bytes": "64MiB"})


def test_calibrate_codec_2_then_serve(reference_model: Path, tmp_path: Path) -> None:
    """Stored, evicted from the engine's own cache, reloaded; a version 1 artifact does not fit."""
    sys.path.insert(0, str(reference_model.parent))
    import data

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(data.texts("train", "mix", characters=60_000)))
    arguments = ["calibrate", str(reference_model), "--data", str(text), "--ratios", "4,8"]
    arguments += ["--tokens", "5000", "--max-len", "900", "--codec", "kvtc2"]
    arguments += ["--out", str(tmp_path / "registry"), "--engine", ENGINE]
    assert main(arguments) == 0
    (directory,) = (tmp_path / "registry").glob("*/*")
    artifact, card, _ = load_rank_artifact(directory, 0)
    assert (artifact.codec, card.codec_name) == ("kvtc2", "kvtc2")
    extra = {"codec": "kvtc2", "ratio": 4, "registry": [str(tmp_path / "registry")]}
    prompts = texts(reference_model, count=3, tokens=700)
    with engine(reference_model, None) as llm:
        expected = greedy(llm, prompts, 16)
    with engine(reference_model, extra | {"memory_bytes": "64MiB"}) as llm:
        assert greedy(llm, prompts, 16) == expected
        assert llm.reset_prefix_cache()
        answers = greedy(llm, prompts, 16)
        values = metrics(llm)
    assert values["kvtc_loaded_tokens"] == values["external_prefix_cache_hits"] == 3 * 544
    assert not any(v for k, v in values.items() if k.startswith("kvtc_failed_loads"))
    # The cache is of float32, twice what ratios are to.
    real = values["kvtc_stored_raw_bytes"] / values["kvtc_stored_bytes"] / 2
    assert 3.2 < real < 4.8
    agreed = [
        a == b for x, y in zip(answers, expected, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert sum(agreed) >= 0.9 * len(agreed)
