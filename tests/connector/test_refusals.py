"""What a user gets wrong at start-up: one clear line, before anything is served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.artifact.registry import ENVIRONMENT_VARIABLE, shipped_registry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.config import ConfigError
from kvtc_vllm.vllm_cache.compat import UnsupportedError
from tests.connector.engine import engine

pytestmark = pytest.mark.vllm


def refused(model: Path, error: type[Exception], extra: dict[str, Any], **options: Any) -> str:
    """Start an engine that must not start; returns the message."""
    with pytest.raises(error) as caught, engine(model, extra, **options):
        pass
    return str(caught.value)


def registry_artifact(model: Path) -> Path:
    """The shipped artifact of the reference model for TP 1."""
    from kvtc_vllm.artifact.identity import model_identity
    from kvtc_vllm.artifact.registry import find

    return find(model_identity(model), 1, 16.0, model_name="reference")


def test_budget_too_small_for_one_chunk(reference_model: Path) -> None:
    message = refused(reference_model, ConfigError, {"preset": "kvtc-16x", "memory_bytes": "10kB"})
    assert "memory_bytes=10kB is too small for one chunk" in message


def test_chunks_that_are_not_whole_blocks(reference_model: Path) -> None:
    message = refused(reference_model, ConfigError, {"codec": "raw", "chunk_tokens": 48})
    assert "chunk_tokens=48 must be a multiple of vLLM's block size, 32" in message


def test_quantised_cache(reference_model: Path) -> None:
    message = refused(
        reference_model,
        UnsupportedError,
        {"preset": "kvtc-16x"},
        kv_cache_dtype="int8_per_token_head",
        dtype="bfloat16",
    )
    assert "--kv-cache-dtype int8_per_token_head is refused" in message
    assert "fp8_e4m3" in message


def test_no_artifact_for_this_model(
    reference_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights: the message names the fingerprint, what was found and the command."""
    other = tmp_path / "other"
    shutil.copytree(reference_model, other)
    _flip_a_weight(other)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "nothing"))
    message = refused(other, ArtifactError, {"preset": "kvtc-16x"})
    for words in ("no KVTC artifact fits", "other weights", f"kvtc calibrate {other}", "--tp 1"):
        assert words in message
    assert str(shipped_registry()) in message


def test_artifact_directory_that_does_not_exist(reference_model: Path, tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    message = refused(reference_model, ArtifactError, {"codec": "kvtc", "artifact": str(missing)})
    assert str(missing) in message
    assert "\n" not in message


def test_artifact_of_another_model(reference_model: Path, tmp_path: Path) -> None:
    import json

    other = tmp_path / "other"
    shutil.copytree(reference_model, other)
    config = json.loads((other / "config.json").read_text())
    config["rope_theta_note"] = "another configuration"
    (other / "config.json").write_text(json.dumps(config))
    _flip_a_weight(other)
    artifact = registry_artifact(reference_model)
    message = refused(other, ArtifactError, {"codec": "kvtc", "artifact": str(artifact)})
    assert "another model" in message
    assert str(artifact) in message


def test_ratio_without_a_plan(reference_model: Path) -> None:
    message = refused(reference_model, ArtifactError, {"codec": "kvtc", "ratio": 13})
    assert "no plan for 13x" in message


def test_corrupt_artifact(reference_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "artifact"
    shutil.copytree(registry_artifact(reference_model), broken)
    path = broken / "rank0of1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 0xFF
    path.write_bytes(content)
    message = refused(reference_model, ArtifactError, {"codec": "kvtc", "artifact": str(broken)})
    assert "rank0of1.safetensors" in message


def test_self_test_catches_an_artifact_that_does_not_fit(
    reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled probe rows stand in for a layout that differs from the calibrated one."""
    from kvtc_vllm.connector import rank_artifacts

    load = rank_artifacts.load_rank_artifact

    def shuffled(directory: Path, rank: int) -> Any:
        artifact, card, probe = load(directory, rank)
        probe.k.copy_(probe.k.flip(3).roll(7, dims=1))
        return artifact, card, probe

    monkeypatch.setattr(rank_artifacts, "load_rank_artifact", shuffled)
    message = refused(reference_model, ArtifactError, {"preset": "kvtc-16x"})
    assert "self-test failed" in message


def _flip_a_weight(model: Path) -> None:
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
