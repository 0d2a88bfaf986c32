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
from kvtc_vllm.calibration.differentiable import (
    GRADIENTS,
    CacheShape,
    Differentiable,
    PrefixGradients,
)
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
from kvtc_vllm.calibration.spool import SpoolReader, cache_group_places
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

    That of a further cache group lies in its directory. One of other settings or another text is
    replaced. Raises what `measure_sensitivity` does.
    """
    texts = read_texts(capture.data, PREFILL_FACTOR * capture.tokens)
    source = sensitivity_source(capture, record, texts, settings)
    places = cache_group_places(spool)
    paths = [place / SENSITIVITY_NAME for place in places]
    groups = [_measured_group(place, record) for place in places]
    if all(
        is_measured(path, shape.layers, shape.kv_heads, "gradient", source, rule)
        for path, (shape, rule) in zip(paths, groups, strict=True)
    ):
        say(f"{paths[0]}: measured earlier with the same settings, used again")
        return paths[0]
    max_model_len = capture.engine.get("max_model_len")
    found = measure_sensitivity(
        model_directory(capture.model, capture.engine.get("revision")),
        texts,
        groups,
        source,
        total_tokens=PREFILL_FACTOR * capture.tokens,
        device=device,
        max_model_len=max_model_len if isinstance(max_model_len, int) else None,
        trust_remote_code=bool(capture.engine.get("trust_remote_code")),
        say=say,
    )
    for path, of_group in zip(paths, found, strict=True):
        save_sensitivity(path, of_group)
    return paths[0]


def _measured_group(place: Path, record: CaptureRecord) -> tuple[CacheShape, SinkRule | None]:
    """What is captured of a cache group, and what marks its sinks."""
    readers = [SpoolReader(place / f"rank{rank}") for rank in range(record.tp_size)]
    header = readers[0].header
    geometry = header.geometry
    sinks = fit_sinks(RankRows(readers, 1, 0, None))
    shape = CacheShape(
        geometry.num_layers,
        header.total_kv_heads,
        geometry.head_size,
        geometry.head_size_v,
        numbers=header.layers,
        reach=readers[0].reach,
    )
    return shape, None if sinks is None else sinks.rule


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
    groups: Sequence[tuple[CacheShape, SinkRule | None]],
    source: SensitivitySource,
    *,
    total_tokens: int,
    device: str = "cpu",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> list[Sensitivity]:
    """Average squared gradients over documents of calibration text that are not held out.

    texts: what a capture reads, cut into the same documents. groups: all cache groups of the
    model, each with what marks its sinks, over the heads of all ranks; without that there is one
    average. Averages are over the tokens that a group's attention sees. source: how many
    documents, how long, and the seed of what is drawn; equal seeds give equal documents and
    labels. total_tokens:
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
    shapes = [shape for shape, _ in groups]
    sums = [_Sums(shape, rule) for shape, rule in groups]
    for document in tqdm(drawn, unit="document", desc="gradients"):
        ids = document.token_ids[: source.prefix_tokens + source.continuation_tokens]
        share = source.prefix_tokens / (source.prefix_tokens + source.continuation_tokens)
        prefix = min(source.prefix_tokens, round(share * len(ids)))
        if prefix <= source.sink_tokens:
            continue
        found = model.gradients(ids, prefix, shapes, generator)
        for of_group, gradients in zip(sums, found, strict=True):
            of_group.add(gradients, prefix, source.sink_tokens)
    numbers = tuple(document.doc for document in drawn)
    return [of_group.average(directory, source, numbers, say) for of_group in sums]


class _Sums:
    """Squared gradients of a cache group, of all tokens and of those that no rule marks."""

    def __init__(self, shape: CacheShape, rule: SinkRule | None) -> None:
        self._shape = shape
        self._rule = rule
        self._every, self._ordinary = torch.zeros(
            2, 2, shape.layers, shape.kv_heads, dtype=torch.float64
        )
        self._tokens = self._marked = 0

    def add(self, found: PrefixGradients, prefix: int, sink_tokens: int) -> None:
        """Those of a document's prefix, but for sinks and what the continuation does not see."""
        first = max(sink_tokens, self._shape.reach.first_needed(prefix))
        energies = torch.stack(found.energies())[..., first:]
        self._every += energies.sum(dim=-1)
        self._tokens += energies.shape[-1]
        marks = torch.zeros(energies.shape[-1], dtype=torch.bool)
        if self._rule is not None and len(marks):
            marks = self._rule.marks(found.cached_values[first:]).cpu()
        self._ordinary += energies[..., ~marks].sum(dim=-1)
        self._marked += int(marks.sum())

    def average(
        self,
        directory: Path,
        source: SensitivitySource,
        documents: tuple[int, ...],
        say: Callable[[str], None],
    ) -> Sensitivity:
        """What was added, per token. Raises what `measure_sensitivity` does."""
        shape, rule, tokens = self._shape, self._rule, self._tokens
        if tokens < 1:
            raise DataError(
                f"--sensitivity gradient: documents of {source.max_len} tokens have none past the "
                f"{source.sink_tokens} sinks to take gradients of; give a larger --max-len"
            )
        if not bool(self._every.isfinite().all()) or not bool(self._ordinary.any()):
            raise GRADIENTS.unusable(directory, "gradients are not finite, or all 0")
        numbers = ", ".join(map(str, documents))
        say(f"{shape.reach}: gradients of {tokens} tokens in documents {numbers}")
        without, sinks = None, None
        if rule is not None:
            energy = 1 - float(self._ordinary.sum() / self._every.sum())
            sinks = Marked(rule=rule, share=self._marked / tokens, energy=energy)
            without = _average(self._ordinary, tokens - self._marked, shape)
            say(f"sinks: {sinks.share:.2%} of them, with {energy:.0%} of the gradients' energy")
        return Sensitivity(
            all_tokens=_average(self._every, tokens, shape),
            ordinary=without,
            marked=sinks,
            documents=documents,
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
