"""Curves of quality: KL of a tiny model's own cache through the codec, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtc_vllm.artifact.card import load_card, ratio_within
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.calibration.calibrate import ArtifactSettings, fit_spool
from kvtc_vllm.calibration.capture_record import CaptureRecord, CaptureSource, save_record
from kvtc_vllm.calibration.documents import Document
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.heldout_documents import DOCUMENTS_NAME, keep_heldout, load_heldout
from kvtc_vllm.calibration.quality_curve import CurveSettings
from kvtc_vllm.calibration.spool import SpoolWriter
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.test_gradients import TINY, VOCABULARY, Letters
from tests.calibration.toy import HEADS, LAYERS, SIZE, toy_header, toy_rope

RATIOS = (2.0, 4.0, 8.0)
DOCUMENTS = 10
TOKENS = 160
HELDOUT = (4, 9)


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Letters())


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (DOCUMENTS, TOKENS), generator=generator).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def spool(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a capture of the tiny model would leave: its cache of ten documents, two held out."""
    directory = tmp_path_factory.mktemp("tiny-spool")
    network = AutoModelForCausalLM.from_pretrained(model)
    header = toy_header(
        geometry=Geometry(LAYERS, HEADS, SIZE, SIZE, ((0, LAYERS),)), layer_rope=(0,) * LAYERS
    )
    with SpoolWriter(directory / "rank0", header, (toy_rope(),)) as writer:
        for number, ids in enumerate(texts()):
            k, v = cache_of(network, ids)
            writer.append(k[4:], v[4:], torch.arange(4, TOKENS), number, number in HELDOUT)
    source = CaptureSource(
        model=model_identity(model).identity,
        tokenizer="",
        texts="",
        tokens=DOCUMENTS * TOKENS,
        max_len=TOKENS,
        sink_tokens=4,
        heldout_fraction=0.2,
        seed=0,
        engine={},
    )
    record = CaptureRecord(
        model_name="tiny", files=("text.txt",), tp_size=1, source=source, tokens_run=0
    )
    save_record(directory, record)
    documents = [Document(n, ids, n in HELDOUT) for n, ids in enumerate(texts())]
    keep_heldout(directory, record, documents)
    return directory


def cache_of(network: torch.nn.Module, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 [T, L, H, D] each."""
    cache = DynamicCache()
    with torch.no_grad():
        network(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
    k, v = (
        torch.stack([getattr(layer, which)[0].transpose(0, 1) for layer in cache.layers], dim=1)
        for which in ("keys", "values")
    )
    return k.bfloat16(), v.bfloat16()


def settings(model: Path, out: Path, **fit: Any) -> ArtifactSettings:
    return ArtifactSettings(
        RATIOS,
        FitSettings(simulation_rows=1024, **fit),
        out=str(out),
        curve=CurveSettings(str(model)),
    )


def test_a_card_has_what_every_ratio_costs(
    spool: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    directory = fit_spool(spool, settings(model, tmp_path))
    card = load_card(directory)
    curve = card.curve
    assert curve is not msgspec.UNSET
    assert sorted(curve.documents) == list(HELDOUT)
    assert tuple(point.ratio for point in curve.points) == RATIOS
    costs = [point.kl for point in curve.points]
    assert 0 < costs[0] < costs[1] < costs[2]
    for point in curve.points:
        assert point.low <= point.kl <= point.high
        # Exact sinks weigh much in prefixes of 120 tokens.
        assert 0.6 * point.ratio < point.real_ratio < 1.3 * point.ratio
    assert ratio_within(card, costs[1]) == 4.0
    assert ratio_within(card, costs[0] / 2) is None
    assert "- KL in nats per token, 2 held-out documents" in (directory / "report.md").read_text()


def test_only_the_ratio_of_a_quality_is_kept(
    spool: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    made = settings(model, tmp_path, codec="kvtc2", paired=True)
    whole = load_card(fit_spool(spool, replace(made, name="whole")))
    assert whole.curve is not msgspec.UNSET
    asked = whole.curve.points[1].kl * 1.001
    kept = load_card(fit_spool(spool, replace(made, name="kept", quality=asked)))
    assert kept.ratios == (4.0,)
    assert kept.curve is not msgspec.UNSET
    assert kept.curve.points == whole.curve.points[1:2]
    assert sum(kept.size_bytes.values()) < sum(whole.size_bytes.values())
    too_much = replace(made, name="none", quality=whole.curve.points[0].kl / 2)
    with pytest.raises(ArtifactError, match=r"--quality .*: the lowest ratio, 2x, has a KL of"):
        fit_spool(spool, too_much)
    assert not (tmp_path / "tiny" / "none").exists()


def test_another_cache_than_the_captured_one_is_refused(
    spool: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    """Of documents that were not there: as if transformers computed something else."""
    kept = load_heldout(spool, model_identity(model).identity)
    others = {n: tuple((i + 1) % VOCABULARY for i in ids) for n, ids in kept.documents.items()}
    copy = tmp_path / "spool"
    copy.mkdir()
    (copy / "rank0").symlink_to(spool / "rank0")
    (copy / "capture.json").write_bytes((spool / "capture.json").read_bytes())
    made = settings(model, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"heldout.json: .*; kvtc calibrate --quality-curve"):
        fit_spool(copy, made)
    changed = msgspec.structs.replace(kept, documents=others)
    (copy / DOCUMENTS_NAME).write_bytes(msgspec.json.encode(changed))
    with pytest.raises(ArtifactError) as caught:
        fit_spool(copy, made)
    assert "its K differs from the captured one" in str(caught.value)
    assert str(caught.value).endswith("leave it out, as well as --quality")
    (copy / DOCUMENTS_NAME).write_bytes(
        msgspec.json.encode(msgspec.structs.replace(kept, model="another"))
    )
    with pytest.raises(ArtifactError, match="is of model another, the spool of"):
        fit_spool(copy, made)
