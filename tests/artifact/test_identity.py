from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvtc_vllm.artifact import identity, remembered, sampling
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.identity import (
    model_identity,
    public_model_name,
    weight_files,
    weights_fingerprint,
)
from kvtc_vllm.codec.errors import ArtifactError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "_name_or_path": "somewhere",
}
ROOT = Path(__file__).parents[2]
SAMPLED = 0
"""A full-hash limit that makes every file sampled."""


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remembered.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_known", {})


def save_config(directory: Path, **changes: Any) -> None:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "toy-model"
    directory.mkdir()
    save_config(directory)
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        tensors = {f"w{shard}.{i}": torch.randn(3000, generator=generator) for i in range(3)} | {
            f"tiny{shard}": torch.ones(2)
        }
        save_file(tensors, directory / f"model-{shard}.safetensors")
    return directory


def flip(path: Path, offset: int) -> None:
    """Change one byte and the modification time, as an edit would."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_both_parts_in_one_string(model: Path) -> None:
    found = model_identity(model)
    assert found.identity == f"{found.config}-{found.weights}"
    assert len(found.config) == len(found.weights) == 32
    assert model_identity(str(model)) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 65},
        {"architectures": ["MistralForCausalLM"]},
        {"rope_scaling": {"factor": 4.0, "rope_type": "llama3"}},
        {"new_key": None},
    ],
)
def test_any_field_changes_the_configuration(model: Path, changes: dict[str, Any]) -> None:
    before = model_identity(model)
    save_config(model, **changes)
    after = model_identity(model)
    assert after.config != before.config
    assert after.weights == before.weights


@pytest.mark.parametrize("key", sorted(identity.VOLATILE_KEYS))
def test_volatile_keys_do_not(model: Path, key: str) -> None:
    before = model_identity(model)
    save_config(model, **{key: "changed"})
    assert model_identity(model) == before


def test_key_order_does_not(model: Path) -> None:
    before = model_identity(model)
    (model / "config.json").write_text(json.dumps(dict(reversed(CONFIG.items())), indent=4))
    assert model_identity(model) == before


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.61, 1.0])
def test_any_weight_byte_counts_when_hashed_whole(model: Path, shard: int, place: float) -> None:
    path = model / f"model-{shard}.safetensors"
    before = weights_fingerprint(model)
    flip(path, int(place * (path.stat().st_size - 1)))
    assert weights_fingerprint(model) != before


def test_samples_see_both_ends_and_the_middle_of_a_tensor(model: Path) -> None:
    path = model / "model-0.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    start, end = header["w0.1"]["data_offsets"]
    for offset in (start, (start + end) // 2, end - 1):
        before = weights_fingerprint(model, SAMPLED)
        flip(path, 8 + length + offset)
        assert weights_fingerprint(model, SAMPLED) != before


def test_samples_see_names_and_sizes(model: Path) -> None:
    before = weights_fingerprint(model, SAMPLED)
    save_file({"renamed": torch.ones(2)}, model / "model-1.safetensors")
    assert weights_fingerprint(model, SAMPLED) != before
    (model / "model-1.safetensors").rename(model / "model-2.safetensors")
    assert len(weight_files(model)) == 2


def test_other_formats(model: Path) -> None:
    for path in weight_files(model):
        path.unlink()
    data = bytes(range(256)) * 200
    (model / "model.gguf").write_bytes(data)
    (model / "training_args.bin").write_bytes(b"not weights")
    assert [path.name for path in weight_files(model)] == ["model.gguf"]
    first = weights_fingerprint(model, SAMPLED)
    flip(model / "model.gguf", len(data) - 1)
    second = weights_fingerprint(model, SAMPLED)
    (model / "model.gguf").write_bytes(data + b"x")
    assert len({first, second, weights_fingerprint(model, SAMPLED)}) == 3


def test_no_weights_is_dummy(model: Path) -> None:
    for path in weight_files(model):
        path.unlink()
    assert model_identity(model).weights == "dummy"


@pytest.mark.parametrize("limit", [identity.FULL_HASH_LIMIT, SAMPLED])
def test_a_file_that_changes_while_it_is_read_is_refused(
    model: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model / "model-0.safetensors"
    data = path.read_bytes()

    def while_reading(original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            path.write_bytes(data)  # not even other content
            return original(*arguments)

        return call

    monkeypatch.setattr(identity, "_whole", while_reading(identity._whole))
    monkeypatch.setattr(sampling, "samples", while_reading(sampling.samples))
    with pytest.raises(ArtifactError, match=r"model-0\.safetensors: the weight file changed while"):
        weights_fingerprint(model, limit)


def test_a_weight_file_that_cannot_be_read_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(identity, "_whole", fail)
    with pytest.raises(ArtifactError, match=r"model-0\.safetensors: Input/output error"):
        weights_fingerprint(model)


def test_shipped_artifacts_are_found_by_the_reference_model_s_weights(
    reference_model: Path,
) -> None:
    cards = sorted((ROOT / "calibrations" / "kvtc-reference").glob("*/card.json"))
    assert cards
    found = weights_fingerprint(reference_model)
    assert found == "699b1cb897b4d51549332491d71db09a"
    assert {load_card(card.parent).weights_fingerprint for card in cards} == {found}


def test_public_name_holds_no_path(model: Path) -> None:
    assert public_model_name(model) == "toy-model"
    assert public_model_name("org/name") == "org/name"


@pytest.mark.parametrize("content", ["", "[]", "{", None])
def test_bad_configuration(model: Path, content: str | None) -> None:
    path = model / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        model_identity(model)


def test_bad_safetensors_header(model: Path) -> None:
    (model / "model-0.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match="header length"):
        weights_fingerprint(model, SAMPLED)
    (model / "model-0.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]" + b"x" * 9)
    with pytest.raises(ArtifactError, match="malformed"):
        weights_fingerprint(model, SAMPLED)
    for offsets in ((0, 10), (-1, 4), (5, 4)):
        header = json.dumps({"w": {"data_offsets": offsets}}).encode()
        content = len(header).to_bytes(8, "little") + header + bytes(9)
        (model / "model-0.safetensors").write_bytes(content)
        with pytest.raises(ArtifactError, match=f"header names bytes .*, .* to {len(content)} are"):
            weights_fingerprint(model, SAMPLED)


def test_hub_id_is_looked_up_without_the_network(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def local_snapshot(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", local_snapshot)
    assert model_identity("org/name", "v1") == model_identity(model)
    assert asked == {"repo": "org/name", "revision": "v1", "local_files_only": True}


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "/no/such/directory"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ArtifactError, match="neither a directory nor in the local"):
        model_identity(name)
