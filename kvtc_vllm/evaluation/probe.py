"""Sensitivities through vLLM alone: noise in one layer's K or V of a cached prefix, KL over energy.

For models that transformers cannot run. To second order a KL divergence is half the mean squared
gradient of the likelihood times the energy of the noise, so the numbers are those that gradients
give. It takes two replays per layer, and as many again for ordinary tokens if the model has sinks.
Replays are in float32, whatever the model is served in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvtc_vllm.artifact.identity import model_directory
from kvtc_vllm.calibration.capture import PREFILL_FACTOR, CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord
from kvtc_vllm.calibration.documents import DataError, Document, Text, read_texts
from kvtc_vllm.calibration.gradients import (
    GradientSettings,
    calibration_documents,
    draw_documents,
    sensitivity_source,
)
from kvtc_vllm.calibration.in_transformers import max_positions
from kvtc_vllm.calibration.rows import CapturedRows
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
from kvtc_vllm.codec.artifact import KINDS, Kind
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.evaluation.methods import DEFAULT_CHUNK_TOKENS
from kvtc_vllm.evaluation.processes.run_probe import CHILD, Effect, ProbeJob, ProbeOutcome
from kvtc_vllm.evaluation.processes.suite import SuiteError, run_child
from kvtc_vllm.evaluation.replay.noise import Noise

RELATIVE_ENERGY = 0.02
"""Energy of the noise over the variance of the layer's K or V. Enough to stand out from rounding,
little enough for the second order."""

PROBE_SETTINGS = GradientSettings(documents=8, continuation_tokens=64)
"""Half of what gradients take: every place costs a replay of all of it."""

REPLAY_DTYPE: Literal["float32"] = "float32"
"""Of the replays, whatever the model's. In 16 bits any change of the cache changes what is rounded
after it, and that outweighs the noise."""

_VARIANCE_ROWS = 2048


@dataclass(frozen=True)
class Place:
    """Where noise is added, and whether sinks are spared."""

    kind: Kind
    layer: int
    ordinary: bool

    @property
    def name(self) -> str:
        """Of the noise in a job."""
        return f"{self.kind}{self.layer}" + (" ordinary" if self.ordinary else "")


class Probe(SensitivityMeasure):
    """Measures by noise. capture: what the spool is captured with, at one rank.

    settings: documents and their tokens; the prefix is rounded down to whole chunks.
    """

    def __init__(
        self, capture: CaptureSettings, settings: GradientSettings = PROBE_SETTINGS
    ) -> None:
        self._capture = capture
        self._settings = settings

    def check(self) -> None:
        """Raise ArtifactError unless the engine has one rank."""
        if self._capture.tp != 1:
            raise ArtifactError(
                f"--sensitivity probe: needs --tp 1, not {self._capture.tp}; capture and probe at "
                "1, then make the artifact with kvtc fit --tp"
            )

    def measure(
        self, record: CaptureRecord, spool: Path, say: Callable[[str], None] = print
    ) -> Path:
        """SPOOL/sensitivity.json, probed unless it is there.

        Raises DataError if there is too little text, ArtifactError if the engine fails or the model
        has several cache groups.
        """
        groups = len(cache_group_places(spool))
        if groups > 1:
            raise ArtifactError(
                f"--sensitivity probe: the model has {groups} cache groups, and noise goes into "
                "layers of one; give --sensitivity gradient or none"
            )
        capture, path = self._capture, spool / SENSITIVITY_NAME
        texts = read_texts(capture.data, PREFILL_FACTOR * capture.tokens)
        readers = [SpoolReader(spool / f"rank{rank}") for rank in range(record.tp_size)]
        rows = RankRows(readers, 1, 0, None)
        source = sensitivity_source(capture, record, texts, self._settings)
        sinks = fit_sinks(rows)
        rule = None if sinks is None else sinks.rule
        header = readers[0].header
        layers = header.geometry.num_layers
        if is_measured(path, layers, header.total_kv_heads, "probe", source, rule):
            say(f"{path}: measured earlier with the same settings, used again")
            return path
        drawn = draw_documents(self._documents(texts, source), source)
        whole = source.prefix_tokens + source.continuation_tokens
        prefix = probe_prefix(source.prefix_tokens, min(len(d.token_ids) for d in drawn))
        places = [
            Place(kind, layer, ordinary)
            for ordinary in ((False,) if rule is None else (False, True))
            for kind in KINDS
            for layer in range(layers)
        ]
        deviations = layer_deviations(rows)
        job = ProbeJob(
            model=capture.model,
            documents=[d.token_ids[:whole] for d in drawn],
            prefix_tokens=prefix,
            noises={
                place.name: Noise(
                    kind=place.kind,
                    layer=place.layer,
                    deviation=RELATIVE_ENERGY**0.5 * deviations[place.kind][place.layer],
                    sink_tokens=source.sink_tokens,
                    rule=rule if place.ordinary else None,
                )
                for place in places
            },
            engine=replay_options(capture.engine),
            out="",
        )
        try:
            outcome = run_child(CHILD, "probe", job, ProbeOutcome)
        except SuiteError as error:
            raise ArtifactError(
                f"--sensitivity probe: replays in {REPLAY_DTYPE} failed; give --sensitivity "
                f"gradient or none if this model cannot run in it: {error}"
            ) from error
        weakest = min(effect.kl for effect in outcome.effects.values())
        say(
            f"probed {len(places)} places on {len(drawn)} documents; KL without noise "
            f"{outcome.floor:.2g} nats, with the least effective {weakest:.2g}"
        )
        found = Sensitivity(
            method="probe",
            all_tokens=average(outcome, [p for p in places if not p.ordinary]),
            ordinary=None if rule is None else average(outcome, [p for p in places if p.ordinary]),
            marked=None if rule is None else marked(outcome, places, rule),
            documents=tuple(d.doc for d in drawn),
            source=source,
            replayed_in=REPLAY_DTYPE,
        )
        save_sensitivity(path, found)
        return path

    def _documents(self, texts: Sequence[Text], source: SensitivitySource) -> list[Document]:
        from transformers import AutoConfig, AutoTokenizer

        capture = self._capture
        directory = model_directory(capture.model, capture.engine.get("revision"))
        trust = bool(capture.engine.get("trust_remote_code"))
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
        limit = capture.engine.get("max_model_len")
        if not isinstance(limit, int):
            limit = max_positions(AutoConfig.from_pretrained(directory, trust_remote_code=trust))
        total = PREFILL_FACTOR * capture.tokens
        return calibration_documents(texts, tokenizer, source, total, limit)


def replay_options(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Of the engine that replays, where `engine` is what captured: all in `REPLAY_DTYPE`."""
    return {**engine, "dtype": REPLAY_DTYPE, "kv_cache_dtype": "auto"}


def probe_prefix(wanted: int, shortest: int) -> int:
    """Tokens of the prefix: whole chunks, with a token and one scored after it in every document.

    Raises DataError if there is no room for a chunk.
    """
    chunks = min(wanted, shortest - 2) // DEFAULT_CHUNK_TOKENS
    if chunks < 1:
        raise DataError(
            f"--sensitivity probe: the shortest document has {shortest} tokens; at least "
            f"{DEFAULT_CHUNK_TOKENS + 2} are needed: give more text or a larger --max-len"
        )
    return chunks * DEFAULT_CHUNK_TOKENS


def layer_deviations(rows: CapturedRows) -> dict[Kind, list[float]]:
    """Root mean square deviation from the mean row, per layer; keys before RoPE."""
    generator = torch.Generator().manual_seed(0)
    index = rows.select(heldout=False, limit=_VARIANCE_ROWS, generator=generator)
    layers = rows.geometry.num_layers
    found: dict[Kind, list[float]] = {}
    for kind in KINDS:
        taken = rows.take(0, kind, index)
        variance = taken.var(dim=0, correction=0).view(layers, -1).mean(dim=1)
        found[kind] = variance.sqrt().tolist()
    return found


def average(outcome: ProbeOutcome, places: Sequence[Place]) -> Average:
    """Sensitivities of places of all layers, K and V, in order of the layers."""
    effects = {kind: [outcome.effects[p.name] for p in places if p.kind == kind] for kind in KINDS}
    k, v = (
        tuple((sensitivity(effect, outcome.floor),) for effect in of_kind)
        for of_kind in effects.values()
    )
    return Average(keys=k, values=v, tokens=effects["k"][0].tokens)


def sensitivity(effect: Effect, floor: float) -> float:
    """Mean squared gradient per element that explains an effect. floor: KL without noise, nats.

    What does not stand out from the floor is 0.
    """
    return max(0.0, 2 * (effect.kl - floor) / effect.energy)


def marked(outcome: ProbeOutcome, places: Sequence[Place], rule: SinkRule) -> Marked:
    """Share of tokens that had noise only where sinks are not spared, and what that did."""
    tokens = [0, 0]
    costs = [0.0, 0.0]
    for place in places:
        effect = outcome.effects[place.name]
        tokens[place.ordinary] = effect.tokens
        # Of equal noise in every place; its energy per token drops out.
        costs[place.ordinary] += sensitivity(effect, outcome.floor) * effect.tokens
    share = 1 - tokens[True] / tokens[False]
    return Marked(rule=rule, share=share, energy=max(0.0, 1 - costs[True] / costs[False]))
