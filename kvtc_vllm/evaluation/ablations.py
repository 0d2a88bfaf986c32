"""The paper's ablations, and one it lacks, each a list of methods to compare. One row each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.rank_file import rank_file_name
from kvtc_vllm.evaluation.data import corpus
from kvtc_vllm.evaluation.data.public import LIBRARY, Source
from kvtc_vllm.evaluation.job import Workload
from kvtc_vllm.evaluation.methods import Method, MethodError
from kvtc_vllm.evaluation.refit import capture, refit

CAPTURE_TOKENS = 40_000
DOMAIN_CHARACTERS = 1_500_000
FITTED_RATIOS = (16.0, 32.0)
KEY_SHARES = (1 / 4, 1 / 3, 0.4, 1 / 2, 0.6, 2 / 3)
"""Of the bits of both, those of the keys. Half is the paper's: the same ratio for both."""

ON_DATA = {
    "prose": "essays",
    "code": "library",
    "litm": "kv-retrieval",
    "variable-tracking": "essay-variables",
    "needle": "essay-needle",
}
"""By generated task, the task over public documents that asks the same."""

Plan = list[tuple[Method, list[Workload]]]


@dataclass(frozen=True)
class Setting:
    """What an ablation works with.

    source: public documents for the tasks; None for the generated tasks. captured: rows to fit,
    as `kvtc calibrate --spool` left them; None: those of the calibration data. work: a
    directory for spools and fits; a fit that is there already is not made again.
    """

    model: str
    rank_file: Path
    calibration_data: Sequence[str]
    count: int
    context: int
    engine: dict[str, Any]
    source: Source | None
    captured: Path | None
    work: Path

    def workload(self, task: str, context: int) -> Workload:
        """A task, or what asks the same of public documents."""
        name = task if self.source is None else ON_DATA[task]
        return Workload(task=name, context=context, count=self.count)

    def workloads(self, *tasks: str) -> list[Workload]:
        """These tasks: running text and needles at the usual context, tables and chains at half.

        A small model looks up one of many entries well only where there are not too many.
        """
        half = ("litm", "variable-tracking")
        return [
            self.workload(task, self.context // 2 if task in half else self.context)
            for task in tasks
        ]

    def spool(self) -> Path:
        """Rows to fit, captured at first use. Raises MethodError without any, and without data."""
        if self.captured is not None:
            return self.captured / "rank0"
        if not self.calibration_data:
            raise MethodError("this ablation fits anew: give --calibration-data or --spool")
        spool = self.work / "spool"
        if not spool.exists():
            capture(self.model, self.calibration_data, CAPTURE_TOKENS, self.engine, spool)
        return spool / "rank0"

    def changed(
        self,
        label: str,
        ratio: float,
        variant: str,
        *,
        rank_file: Path | None = None,
        options: dict[str, Any] | None = None,
        **method: Any,
    ) -> Method:
        """Our codec with a variant of the artifact."""
        override = {
            "variant": variant,
            "artifact": str(rank_file or self.rank_file),
            "ratio": ratio,
            "options": options or {},
        }
        return Method(f"kvtc-{ratio:g}x {label}", label, override=override, **method)

    def refitted(
        self,
        label: str,
        ratios: Sequence[float],
        rank_file: Path,
        workloads: list[Workload],
        variant: str = "unchanged",
    ) -> Plan:
        """One artifact at several ratios."""
        return [
            (self.changed(label, ratio, variant, rank_file=rank_file), workloads)
            for ratio in ratios
        ]


@dataclass(frozen=True)
class Ablation:
    """A question and how to answer it."""

    name: str
    description: str
    plan: Callable[[Setting], Plan]


def _sinks(setting: Setting) -> Plan:
    workloads = setting.workloads("prose", "litm", "variable-tracking", "needle")
    return [
        (setting.changed(label, ratio, variant), workloads)
        for ratio in (16.0, 64.0)
        for label, variant in (("sinks exact", "unchanged"), ("sinks coded", "coded-sinks"))
    ]


def _window(setting: Setting) -> Plan:
    """Chunks of 64 tokens, so that a stored window of 64 or 128 ends on a chunk."""
    chunk, ratio = 64, 16.0
    contexts = [c for c in (256, 512, 1024, 2048, 3840) if c <= 2 * setting.context]
    workloads = [setting.workload("prose", context) for context in contexts]

    def recomputed(window: int) -> Method:
        return setting.changed(
            f"recomputed window {window}", ratio, "unchanged", window=window, chunk_tokens=chunk
        )

    plan: Plan = [(recomputed(window), workloads) for window in (16, 64, 128)]
    # Context by context, since these can share an exact pass: none recomputes anything.
    for context, workload in zip(contexts, workloads, strict=True):
        plan.append((recomputed(0), [workload]))
        for window in (64, 128):
            method = setting.changed(
                f"stored window {window}",
                ratio,
                "stored-window",
                options={"raw_from": context - window},
                window=0,
                chunk_tokens=chunk,
            )
            plan.append((method, [workload]))
    return plan


def _allocation(setting: Setting) -> Plan:
    workloads = setting.workloads("prose", "litm", "needle")
    plan: Plan = []
    for ratio in (16.0, 32.0):
        plan.append((setting.changed("allocated", ratio, "unchanged"), workloads))
        for name in ("fp8", "int4"):
            options = {"type": name, "size": 16}
            method = setting.changed(f"truncated {name}", ratio, "truncated", options=options)
            plan.append((method, workloads))
    return plan


def _keys_values(setting: Setting) -> Plan:
    """One budget of bits divided unequally: methods of a ratio have the same bytes but for DEFLATE.

    Each of keys and values is coded by the plan of a ratio of its own.
    """
    workloads = setting.workloads("prose", "litm", "variable-tracking", "needle")
    divided = {
        (ratio, share): {
            "k": round(ratio / (2 * share), 6),
            "v": round(ratio / (2 * (1 - share)), 6),
        }
        for ratio in (16.0, 32.0)
        for share in KEY_SHARES
    }
    ratios = sorted({single for pair in divided.values() for single in pair.values()})
    fitted = refit(setting.spool(), setting.work, ratios)
    return [
        (
            setting.changed(
                f"keys {share:.0%}", ratio, "mixed-ratios", rank_file=fitted, options=pair
            ),
            workloads,
        )
        for (ratio, share), pair in divided.items()
    ]


def _layers(setting: Setting) -> Plan:
    spool, ratios = setting.spool(), FITTED_RATIOS
    workloads = setting.workloads("prose", "litm", "needle")
    plan: Plan = []
    for layers in layer_counts(load_card(setting.rank_file.parent).geometry.num_layers):
        name = "all layers" if layers is None else f"{layers} layers a group"
        fitted = refit(spool, setting.work, ratios, layers_per_group=layers)
        plan += setting.refitted(name, ratios, fitted, workloads)
    return plan


def layer_counts(layers: int) -> list[int | None]:
    """Layers per layer group: all (None), a half, a third, a sixth and one, each once."""
    parts = dict.fromkeys(max(1, layers // share) for share in (2, 3, 6, layers))
    return [None, *(part for part in parts if part < layers)]


def _calibration_size(setting: Setting) -> Plan:
    spool, workloads = setting.spool(), setting.workloads("prose", "litm", "needle")
    plan: Plan = []
    for rows in (1250, 5000, 20_000, 40_000):
        fitted = refit(spool, setting.work, FITTED_RATIOS, rows=rows)
        plan += setting.refitted(f"{rows} rows", (32.0,), fitted, workloads)
    return plan


def _domain(setting: Setting) -> Plan:
    workloads, ratios = setting.workloads("prose", "code", "litm", "needle"), FITTED_RATIOS
    plan: Plan = []
    for domain, documents in (
        ("prose", _texts(setting.source, "essays", corpus.prose_documents)),
        ("code", _texts(setting.source, LIBRARY, corpus.code_documents)),
    ):
        setting.work.mkdir(parents=True, exist_ok=True)
        text = setting.work / f"{domain}.txt"
        text.write_text("\n\n".join(documents)[:DOMAIN_CHARACTERS], encoding="utf-8")
        spool = setting.work / f"spool-{domain}"
        if not spool.exists():
            capture(setting.model, [str(text)], CAPTURE_TOKENS // 2, setting.engine, spool)
        fitted = refit(spool / "rank0", setting.work, ratios)
        plan += [
            (
                setting.changed(f"fitted on {domain}", ratio, "unchanged", rank_file=fitted),
                workloads,
            )
            for ratio in ratios
        ]
    return plan


def _texts(
    source: Source | None, data_set: str, generated: Callable[[corpus.Split], tuple[str, ...]]
) -> Sequence[str]:
    """What a domain is fitted on: documents that no task reports on."""
    if source is None:
        return generated("train")
    calibration = Source(source.directory, "calibrate")
    return [document.content["text"] for document in calibration.documents(data_set)]


def _rope(setting: Setting) -> Plan:
    spool, ratios = setting.spool(), FITTED_RATIOS
    workloads = setting.workloads("prose", "litm", "needle")
    plan: Plan = []
    for label, variant, kept in (
        ("RoPE undone", "unchanged", False),
        ("RoPE kept", "rope-kept", True),
    ):
        fitted = refit(spool, setting.work, ratios, rope_kept=kept)
        plan += [
            (setting.changed(label, ratio, variant, rank_file=fitted), workloads)
            for ratio in ratios
        ]
    return plan


ABLATIONS: dict[str, Ablation] = {
    ablation.name: ablation
    for ablation in (
        Ablation("sinks", "the four oldest tokens exact, or coded like the rest", _sinks),
        Ablation(
            "window", "newest tokens recomputed as here, or stored raw as in the paper", _window
        ),
        Ablation("layers", "layers coded together: all, halves, thirds, sixths, one", _layers),
        Ablation("allocation", "dynamic programming against plain truncation", _allocation),
        Ablation("calibration-size", "1250 to 40000 rows", _calibration_size),
        Ablation("domain", "fitted on prose or code, tested on both", _domain),
        Ablation(
            "keys-values", "one budget divided unequally between keys and values", _keys_values
        ),
        Ablation("rope", "keys coded before or after RoPE (no table in the paper)", _rope),
    )
}


def plan(
    name: str,
    model: str,
    artifact: str | None,
    calibration_data: Sequence[str],
    count: int,
    context: int,
    engine: dict[str, Any],
    work: Path,
    source: Source | None = None,
    spool: Path | None = None,
    only: Collection[str] | None = None,
) -> Plan:
    """Methods and tasks of one ablation. Raises MethodError for an unknown name, and for `only`
    without any of the ablation's tasks.

    source, spool: `source` and `captured` of `Setting`. only: leave out other tasks than these.
    """
    if name not in ABLATIONS:
        raise MethodError(f"ablation {name!r} is not known; give one of {', '.join(ABLATIONS)}")
    directory = registry.find(model_identity(model), 1, 16.0, model_name=model, artifact=artifact)
    setting = Setting(
        model=model,
        rank_file=directory / rank_file_name(0, 1),
        calibration_data=calibration_data,
        count=count,
        context=context,
        engine=engine,
        source=source,
        captured=spool,
        work=work,
    )
    whole = ABLATIONS[name].plan(setting)
    if only is None:
        return whole
    kept = [(method, [w for w in workloads if w.task in only]) for method, workloads in whole]
    part = [(method, workloads) for method, workloads in kept if workloads]
    if not part:
        tasks = dict.fromkeys(w.task for _, workloads in whole for w in workloads)
        raise MethodError(
            f"ablation {name!r} has no task {', '.join(only)}; it has {', '.join(tasks)}"
        )
    return part
