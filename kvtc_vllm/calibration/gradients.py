"""Sensitivities by gradients: averages over documents of a calibration text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvtc_vllm.artifact.identity import model_directory
from kvtc_vllm.calibration.capture import PREFILL_FACTOR, CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord, texts_fingerprint
from kvtc_vllm.calibration.differentiable import GRADIENTS, CacheShape, Differentiable
from kvtc_vllm.calibration.documents import DataError, Document, Text, make_documents, read_texts
from kvtc_vllm.calibration.in_transformers import check_supported
from kvtc_vllm.calibration.sensitivity import (
    SENSITIVITY_NAME,
    Average,
    Marked,
    Sensitivity,
    SensitivityMeasure,
    SensitivitySource,
    is_measured,
    save_sensitivity,
)
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.sinks import fit_sinks
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.codec.sink_rule import SinkRule


@dataclass(frozen=True)
class GradientSettings:
    """What gradients are taken of.

    documents: of the calibration text; held-out ones are left out.
    prefix_tokens, continuation_tokens: of each, at most. A shorter document is cut in proportion.
    """

    documents: int = 16
    prefix_tokens: int = 640
    continuation_tokens: int = 128


class Gradients(SensitivityMeasure):
    """Measures by gradients, on the device given. capture: what the spool is captured with."""

    def __init__(self, capture: CaptureSettings, settings: GradientSettings, device: str) -> None:
        self._capture = capture
        self._settings = settings
        self._device = device

    def check(self) -> None:
        """Raise ArtifactError if transformers does not know the model."""
        check_supported(
            model_directory(self._capture.model, self._capture.engine.get("revision")),
            GRADIENTS,
            trust_remote_code=bool(self._capture.engine.get("trust_remote_code")),
        )

    def measure(self, record: CaptureRecord, spool: Path) -> Path:
        """SPOOL/sensitivity.json, measured unless it is there."""
        return spool_sensitivity(self._capture, record, spool, self._settings, self._device)


def spool_sensitivity(
    capture: CaptureSettings,
    record: CaptureRecord,
    spool: Path,
    settings: GradientSettings,
    device: str,
    say: Callable[[str], None] = print,
) -> Path:
    """SPOOL/sensitivity.json of a finished capture, measured unless it is there.

    One of other settings or another text is replaced. Raises what `measure_sensitivity` does.
    """
    path = spool / SENSITIVITY_NAME
    texts = read_texts(capture.data, PREFILL_FACTOR * capture.tokens)
    readers = [SpoolReader(spool / f"rank{rank}") for rank in range(record.tp_size)]
    header = readers[0].header
    geometry = header.geometry
    source = sensitivity_source(capture, record, texts, settings)
    sinks = fit_sinks(RankRows(readers, 1, 0, None))
    rule = None if sinks is None else sinks.rule
    if is_measured(path, geometry.num_layers, header.total_kv_heads, "gradient", source, rule):
        say(f"{path}: measured earlier with the same settings, used again")
        return path
    max_model_len = capture.engine.get("max_model_len")
    found = measure_sensitivity(
        model_directory(capture.model, capture.engine.get("revision")),
        texts,
        CacheShape(
            geometry.num_layers, header.total_kv_heads, geometry.head_size, geometry.head_size_v
        ),
        source,
        rule,
        total_tokens=PREFILL_FACTOR * capture.tokens,
        device=device,
        max_model_len=max_model_len if isinstance(max_model_len, int) else None,
        trust_remote_code=bool(capture.engine.get("trust_remote_code")),
        say=say,
    )
    save_sensitivity(path, found)
    return path


def sensitivity_source(
    capture: CaptureSettings,
    record: CaptureRecord,
    texts: Sequence[Text],
    settings: GradientSettings,
) -> SensitivitySource:
    """What a measurement with these settings is of."""
    return SensitivitySource(
        model=record.source.model,
        texts=texts_fingerprint(texts),
        documents=settings.documents,
        prefix_tokens=settings.prefix_tokens,
        continuation_tokens=settings.continuation_tokens,
        sink_tokens=capture.sink_tokens,
        max_len=capture.max_len,
        heldout_fraction=capture.heldout_fraction,
        seed=capture.seed,
    )


def measure_sensitivity(
    directory: Path,
    texts: Sequence[Text],
    shape: CacheShape,
    source: SensitivitySource,
    rule: SinkRule | None,
    *,
    total_tokens: int,
    device: str = "cpu",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> Sensitivity:
    """Average squared gradients over documents of calibration text that are not held out.

    texts: what a capture reads, cut into the same documents. source: how many documents, how
    long, and the seed of what is drawn; equal seeds give equal documents and labels. rule: what
    marks sinks, over the heads of all ranks; without it there is one average. total_tokens:
    of all documents of the capture. max_model_len: of the engine; None: the model's. Shows a
    progress bar. Raises ArtifactError if transformers cannot run the model, DataError if there is
    too little text.
    """
    model = Differentiable(directory, device, trust_remote_code=trust_remote_code)
    limit = max_model_len or model.max_positions
    drawn = draw_documents(
        calibration_documents(texts, model.tokenizer, source, total_tokens, limit), source
    )
    generator = torch.Generator().manual_seed(source.seed)
    sums = [torch.zeros(2, shape.layers, shape.kv_heads, dtype=torch.float64) for _ in range(2)]
    tokens = marked = 0
    for document in tqdm(drawn, unit="document", desc="gradients"):
        ids = document.token_ids[: source.prefix_tokens + source.continuation_tokens]
        share = source.prefix_tokens / (source.prefix_tokens + source.continuation_tokens)
        prefix = min(source.prefix_tokens, round(share * len(ids)))
        if prefix <= source.sink_tokens:
            continue
        found = model.gradients(ids, prefix, shape, generator)
        energies = torch.stack(found.energies())[..., source.sink_tokens :]
        sums[0] += energies.sum(dim=-1)
        tokens += energies.shape[-1]
        marks = torch.zeros(energies.shape[-1], dtype=torch.bool)
        if rule is not None:
            marks = rule.marks(found.cached_values[source.sink_tokens :]).cpu()
        sums[1] += energies[..., ~marks].sum(dim=-1)
        marked += int(marks.sum())
    if tokens < 1:
        raise DataError(
            f"--sensitivity gradient: documents of {source.max_len} tokens have none past the "
            f"{source.sink_tokens} sinks to take gradients of; give a larger --max-len"
        )
    every, ordinary = sums
    if not bool(every.isfinite().all()) or not bool(ordinary.any()):
        raise GRADIENTS.unusable(directory, "gradients are not finite, or all 0")
    numbers = tuple(document.doc for document in drawn)
    say(f"gradients of {tokens} tokens in documents {', '.join(map(str, numbers))}")
    without, sinks = None, None
    if rule is not None:
        energy = 1 - float(ordinary.sum() / every.sum())
        sinks = Marked(rule=rule, share=marked / tokens, energy=energy)
        without = _average(ordinary, tokens - marked, shape)
        say(f"sinks: {sinks.share:.2%} of them, with {energy:.0%} of the gradients' energy")
    return Sensitivity(
        all_tokens=_average(every, tokens, shape),
        ordinary=without,
        marked=sinks,
        documents=numbers,
        source=source,
    )


def _average(sums: torch.Tensor, tokens: int, shape: CacheShape) -> Average:
    """sums: float64 [2, L, H], of squared gradients of K and V."""
    k, v = (
        total / (tokens * size)
        for total, size in zip(sums, (shape.head_size, shape.head_size_v), strict=True)
    )
    return Average(
        keys=tuple(map(tuple, k.tolist())), values=tuple(map(tuple, v.tolist())), tokens=tokens
    )


def calibration_documents(
    texts: Sequence[Text],
    tokenizer: Any,
    source: SensitivitySource,
    total_tokens: int,
    max_model_len: int,
) -> list[Document]:
    """The documents that a capture of the same text and settings ran. Raises DataError.

    tokenizer: of transformers. total_tokens: of all documents. max_model_len: of the engine.
    """

    def render(text: Text) -> str:
        if isinstance(text, str):
            return text
        return str(tokenizer.apply_chat_template(text, tokenize=False))

    return make_documents(
        map(render, texts),
        tokenizer.encode,
        max_tokens=min(source.max_len, max_model_len - 1),
        total_tokens=total_tokens,
        heldout_fraction=source.heldout_fraction,
        seed=source.seed,
    )


def draw_documents(documents: Sequence[Document], source: SensitivitySource) -> list[Document]:
    """Documents of the fit, in order of their numbers: long enough ones, else the longest."""
    wanted = source.prefix_tokens + source.continuation_tokens
    usable = [d for d in documents if not d.heldout]
    random.Random(source.seed).shuffle(usable)
    # Stable: among those that are long enough the draw decides.
    usable.sort(key=lambda d: -min(len(d.token_ids), wanted))
    return sorted(usable[: source.documents], key=lambda d: d.doc)
