from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.artifact.rank_file import read_rank_file, write_rank_file
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.payload import CoefficientGroup
from kvtc_vllm.codec.sink_rule import SinkRule
from tests.calibration.toy import DATA, IDENTITY, RANK_FILE, RATIOS, SIZE

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "artifact"))


@pytest.fixture
def copy_of_pairs(written_pairs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written_pairs, tmp_path / "artifact"))


def edit(directory: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> None:
    """Rewrite the rank file after `change`, with a checksum that fits: damage by design."""
    path = directory / RANK_FILE
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kvtc"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata={"kvtc": json.dumps(header)})
    accept(directory)


def accept(directory: Path) -> None:
    """Make the card agree with whatever the rank file now is."""
    data = (directory / RANK_FILE).read_bytes()
    edit_card(
        directory,
        size_bytes={RANK_FILE: len(data)},
        checksums={RANK_FILE: xxhash.xxh3_128_hexdigest(data)},
    )


def edit_card(directory: Path, **changes: Any) -> None:
    path = directory / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("directory", "made_by"), [("written", "fit"), ("written_pairs", "paired_fit")]
)
def test_round_trip(
    directory: str, made_by: str, reader: SpoolReader, request: pytest.FixtureRequest
) -> None:
    written: Path = request.getfixturevalue(directory)
    original: RankArtifact = request.getfixturevalue(made_by).artifact
    artifact, card, probe = load_rank_artifact(written, 0)
    assert artifact.fingerprint == original.fingerprint
    assert artifact.geometry == original.geometry
    assert artifact.layer_rope == original.layer_rope
    assert artifact.sink_tokens == 4
    for key, section in original.sections.items():
        loaded = artifact.sections[key]
        assert torch.equal(loaded.mean, section.mean)
        assert torch.equal(loaded.basis, section.basis)
        for ratio, plan in section.plans.items():
            assert loaded.plans[ratio].fingerprint_bytes() == plan.fingerprint_bytes()
            assert loaded.plans[ratio].expected_error == plan.expected_error
        assert loaded.heldout_error == section.heldout_error
    assert [r.fingerprint() for r in artifact.ropes] == [r.fingerprint() for r in original.ropes]
    expected = reader.probe()
    assert torch.equal(probe.k, expected.k)
    assert torch.equal(probe.v, expected.v)
    assert torch.equal(probe.positions, expected.positions)
    assert card.identity == IDENTITY.identity
    assert card.ratios == RATIOS
    assert card.data == DATA
    assert card.size_bytes == {RANK_FILE: (written / RANK_FILE).stat().st_size}
    assert {(s.group, s.kind) for s in card.sections} == set(original.sections)


def set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name] = value(tensors[name]).contiguous()

    return change


def set_header(**changes: Any) -> Any:
    return lambda tensors, header: header.update(changes)


def drop(name: str) -> Any:
    return lambda tensors, header: tensors.pop(name)


def fill(index: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def filled(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return filled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("k0.mean"), r"k0\.mean is missing"),
        (drop("v1.plan2"), r"v1\.plan2 is missing"),
        (drop("rope0"), "rope0 is missing"),
        (drop("probe.positions"), r"probe\.positions is missing"),
        (lambda tensors, _: tensors.update(extra=torch.zeros(1)), "extra is not a tensor"),
        (set_tensor("k0.mean", lambda t: t[:-1]), r"k0\.mean is F32 \(31,\), expected F32 \(32\)"),
        (set_tensor("k0.mean", lambda t: t.double()), r"k0\.mean is F64"),
        (set_tensor("k0.mean", fill(0, float("nan"))), r"k0\.mean holds NaN"),
        (set_tensor("k0.mean", fill(0, 7.5)), "fingerprint is"),
        (set_tensor("v0.basis", fill((0, 0), 0.25)), "fingerprint is"),
        (set_tensor("v0.basis", lambda t: t[:, :0]), r"v0\.basis has 0 columns"),
        (set_tensor("v0.errors", fill((0, 0), 0.5)), "rising ones"),
        (set_tensor("v0.errors", fill((0, 0), 9.0)), "rising ones"),
        (set_tensor("v0.errors", fill((0, 1), -1.0)), "negative"),
        (set_tensor("v0.errors", lambda t: t[:0]), "rising ones"),
        (set_tensor("k1.plan0", fill((0, 2), 77)), r"k1\.plan0 has type 77"),
        (set_tensor("k1.plan0", fill((0, 1), 10**6)), "overlaps"),
        (set_tensor("k1.plan0", fill((0, 0), -1)), "overlaps"),
        (set_tensor("k1.plan0", fill((0, 1), 0)), "overlaps"),
        (set_tensor("k1.plan0", lambda t: t.flip(0).repeat(2, 1)), "overlaps"),
        (
            set_tensor(
                "k1.plan2", lambda t: torch.tensor([[i, 1, 3] for i in range(8)], dtype=torch.int32)
            ),
            "layer group 1 at ratio 8 take K 320 and V 0 bits a row, the budget is 96",
        ),
        (set_tensor("rope0", lambda t: t[:, :7]), "rope0 has shape"),
        (set_tensor("rope0", lambda t: torch.cat((t, t), dim=1)), "rope0 has shape"),
        (set_tensor("rope0", lambda t: t[:50]), r"probe\.positions leave the RoPE table of 50"),
        (set_tensor("rope0", lambda t: t * 0.5), "rope_fingerprints"),
        (set_tensor("probe.k", lambda t: t[:5]), r"probe\.k is"),
        (set_tensor("probe.positions", lambda t: t.flip(0)), "rising positions"),
        (set_tensor("probe.positions", lambda t: t[:0]), "rising positions"),
        (set_header(format_version=99), "format_version is 99"),
        (set_header(rank=1), "rank is 1 of 1, expected 0 of 1"),
        (set_header(sink_tokens=-1), "sink_tokens"),
        (set_header(sink_tokens=5), "fingerprint is"),
        (set_header(layer_rope=[0]), "layer_rope has 1 entries"),
        (set_header(layer_rope=[0, 0, 0, 4]), "layer_rope names table 4"),
        (set_header(surprise=1), "surprise"),
        (set_header(geometry={"num_layers": 4}), "num_kv_heads"),
    ],
)
def test_damaged_rank_file(copy: Path, change: Any, message: str) -> None:
    edit(copy, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_rank_artifact(copy, 0)
    assert RANK_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def rename(before: str, after: str) -> Any:
    """Of every tensor whose name begins so."""

    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(before)]:
            tensors[name.replace(before, after)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("kv0.mean"), r"kv0\.mean is missing"),
        (drop("kv1.basis"), r"kv1\.basis is missing"),
        (
            lambda tensors, _: tensors.update({"k1.mean": torch.zeros(32)}),
            r"kv0\.mean is of K and V together, and k1\.mean is of one of them",
        ),
        (rename("kv1.", "v1."), r"kv0\.mean is of K and V together, and v1\.mean is of one"),
        (rename("kv1.", "kv7."), r"kv1\.mean is missing"),
        (rename("kv", "k"), r"k0\.mean is F32 \(48,\), expected F32 \(32\)"),
        (
            set_header(codec="kvtc"),
            r"kv0\.mean is of K and V together; codec 'kvtc' has a basis each",
        ),
        (
            set_tensor("kv0.mean", lambda t: t[:32]),
            r"kv0\.mean is F32 \(32,\), expected F32 \(48\)",
        ),
        (set_tensor("kv1.basis", lambda t: t[:16]), r"kv1\.basis is F16 \(16, "),
        (set_tensor("kv1.mean", lambda t: t.roll(32)), "fingerprint is"),
        (
            lambda tensors, _: tensors.update({"kv0.weights": torch.ones(16)}),
            r"kv0\.weights is F32",
        ),
        (lambda tensors, _: tensors.update({"k0.errors": torch.zeros(1)}), r"k0\.errors is not a"),
    ],
)
def test_damaged_pairs(copy_of_pairs: Path, change: Any, message: str) -> None:
    edit(copy_of_pairs, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_rank_artifact(copy_of_pairs, 0)
    assert RANK_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pair_in_a_file_of_codec_1(copy: Path) -> None:
    edit(copy, rename("k1.", "kv1."))
    with pytest.raises(ArtifactError, match=r"kv1\.mean is of K and V together; codec 'kvtc' has"):
        load_rank_artifact(copy, 0)


@pytest.mark.parametrize(
    "geometry",
    [
        {"num_layers": 0, "layer_groups": []},
        {"num_layers": 4, "layer_groups": [[0, 4], [4, 2]]},
        {"num_layers": 2**60, "layer_groups": [[0, 2**60]]},
        {"head_size": -8},
    ],
)
def test_hostile_geometry(copy: Path, geometry: dict[str, Any]) -> None:
    edit(copy, lambda tensors, header: header["geometry"].update(geometry))
    with pytest.raises(ArtifactError):
        load_rank_artifact(copy, 0)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_truncated_rank_file(copy: Path, keep: int) -> None:
    path = copy / RANK_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        load_rank_artifact(copy, 0)
    accept(copy)
    with pytest.raises(ArtifactError, match=RANK_FILE):
        load_rank_artifact(copy, 0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_refused(written: Path, data: st.DataObject) -> None:
    """The checksum sees what the fingerprint leaves out: errors, RoPE tables, probe."""
    original = (written / RANK_FILE).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << bit % 8
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(written / "card.json", directory)
        path = Path(directory) / RANK_FILE
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            load_rank_artifact(Path(directory), 0)
        # Past the checksum, a flipped bit is refused too, or is one that codes the same bytes.
        accept(Path(directory))
        try:
            artifact, card, _ = load_rank_artifact(Path(directory), 0)
        except ArtifactError:
            return
        assert artifact.fingerprint.hex() == card.fingerprints[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"tp_size": 2}, "tp_size is 2"),
        ({"fingerprints": ["00"]}, "fingerprints is"),
        ({"ratios": [2.0]}, "ratios is"),
        ({"checksums": {}}, "size_bytes and checksums"),
        ({"checksums": {}, "size_bytes": {}}, "do not name rank0of1"),
        ({"checksums": {RANK_FILE: "00"}}, "damaged"),
        ({"sink_tokens": 3}, "sink_tokens is"),
        ({"unknown": 1}, "unknown"),
        ({"created": 5}, "created"),
    ],
)
def test_damaged_card(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_card(copy, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_rank_artifact(copy, 0)


def test_missing_files(copy: Path) -> None:
    (copy / RANK_FILE).unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        load_rank_artifact(copy, 0)
    (copy / "card.json").unlink()
    with pytest.raises(ArtifactError, match="not an artifact"):
        load_rank_artifact(copy, 0)


def test_fingerprint_covers_what_influences_bytes(fit: RankFit) -> None:
    artifact = fit.artifact
    base = artifact.fingerprint
    assert artifact_fingerprint(artifact.geometry, artifact.sections, 4) == base
    assert artifact_fingerprint(artifact.geometry, artifact.sections, 5) != base
    other_groups = dataclasses.replace(artifact.geometry, head_size_v=5)
    assert artifact_fingerprint(other_groups, artifact.sections, 4) != base
    section = artifact.sections[0, "k"]

    def with_section(**changes: Any) -> bytes:
        sections = artifact.sections | {(0, "k"): dataclasses.replace(section, **changes)}
        return artifact_fingerprint(artifact.geometry, sections, 4)

    assert with_section(mean=section.mean + 1) != base
    assert with_section(basis=-section.basis) != base
    assert with_section(heldout_error={}) == base
    plan = section.plans[2.0]
    groups = (CoefficientGroup(0, 1, "int2"), *plan.groups[1:])
    changed = section.plans | {2.0: dataclasses.replace(plan, groups=groups)}
    assert with_section(plans=changed) != base
    predicted = section.plans | {2.0: dataclasses.replace(plan, predicted_error=0.5)}
    assert with_section(plans=predicted) == base
    assert artifact.geometry.head_size == SIZE
    rules = [SinkRule((0, 1), 0.5), SinkRule((0, 1), 0.25), SinkRule((1,), 0.5)]
    rules.append(SinkRule((0, 1), 0.5, max_share=0.1))
    with_rule = {artifact_fingerprint(artifact.geometry, artifact.sections, 4, r) for r in rules}
    assert len(with_rule | {base}) == len(rules) + 1


def test_a_sink_rule_is_kept(fit: RankFit, written: Path, tmp_path: Path) -> None:
    artifact = fit.artifact
    layers = artifact.geometry.num_layers
    rule = SinkRule((0, layers - 1), -0.1, max_share=1 / 3)
    fingerprint = artifact_fingerprint(artifact.geometry, artifact.sections, 4, rule)
    whole = dataclasses.replace(artifact, sink_rule=rule, fingerprint=fingerprint)
    _, probe = read_rank_file(written / RANK_FILE, 0, 1)
    path = tmp_path / RANK_FILE
    write_rank_file(path, whole, probe, 0, 1)
    found, _ = read_rank_file(path, 0, 1)
    assert (found.sink_rule, found.fingerprint) == (rule, fingerprint)
    assert read_rank_file(written / RANK_FILE, 0, 1)[0].sink_rule is None
    with pytest.raises(ValueError, match=f"sink_rule names layer {layers}, but the model has"):
        dataclasses.replace(artifact, sink_rule=SinkRule((layers,), 0.0))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": [0], "threshold": 0.5}, "fingerprint is"),
        ({"layers": [99], "threshold": 0.5}, "sink_rule names layer 99"),
        ({"layers": [1, 0], "threshold": 0.5}, "layers .1, 0. of a sink rule"),
        ({"layers": [0], "threshold": 0.5, "max_share": 2.0}, "max_share 2.0"),
        ({"layers": [0]}, "threshold"),
        ("none", "sink_rule"),
    ],
)
def test_a_wrong_sink_rule_is_refused(copy: Path, rule: Any, message: str) -> None:
    edit(copy, lambda tensors, header: header.update(sink_rule=rule))
    with pytest.raises(ArtifactError, match=message):
        load_rank_artifact(copy, 0)
