"""The report of an artifact: report.md and one page of plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvtc_vllm.artifact.card import ArtifactCard, SensitivityCard
from kvtc_vllm.calibration.fit import RankFit
from kvtc_vllm.calibration.plan_report import bits_per_coefficient, describe_plan
from kvtc_vllm.calibration.step_plans import CHUNK_TOKENS
from kvtc_vllm.codec.artifact import SectionName
from kvtc_vllm.codec.v2.codec import Kvtc2Codec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[SectionName, str] = {"k": "-", "v": "--", "kv": "-"}


def write_report(directory: Path, card: ArtifactCard, fits: Sequence[RankFit]) -> None:
    """Write report.md (all ranks) and report.png (rank 0) into a directory."""
    (directory / "report.md").write_text(_markdown(card, fits), encoding="utf-8")
    _plot(directory / "report.png", card, fits[0])


def _markdown(card: ArtifactCard, fits: Sequence[RankFit]) -> str:
    geometry, weights = card.geometry, card.sensitivity
    lines = [
        f"# KVTC artifact for {card.model_name}",
        "",
        f"- identity: `{card.identity}`",
        f"- created: {card.created}, "
        + ", ".join(f"{name} {number}" for name, number in card.versions.items()),
        f"- tensor-parallel ranks: {card.tp_size}; a rank has {geometry.num_layers} layers, "
        f"{geometry.num_kv_heads} KV heads, head size {geometry.head_size} (K) and "
        f"{geometry.head_size_v} (V), layer groups "
        + ", ".join(f"{first}-{end - 1}" for first, end in geometry.layer_groups),
        f"- cache dtype: {card.kv_dtype}; first {card.sink_tokens} positions stored exactly",
        f"- data: {', '.join(card.data.files) or 'not named'}; {card.data.tokens} tokens run, "
        f"{card.data.train_tokens} fitted, {card.data.heldout_tokens} held out, "
        f"seed {card.data.seed}",
        f"- fit: {card.method}, {card.seconds:.0f} s; "
        f"{sum(card.size_bytes.values()) / 2**20:.1f} MiB on disk",
        *_sensitivity_lines(card),
        *_sink_lines(card),
        *_curve_lines(card),
        "",
        "Errors are relative and squared, of rows after mean removal (keys before RoPE): "
        "predicted on the rows the plan was made for / measured on held-out rows"
        + (
            ". "
            if weights is msgspec.UNSET
            else ", both of weighted rows / measured on held-out rows without their weights. "
        )
        + f"Ratios are {_ratios(card)}, of K and V {_budget(card)}.",
        "",
        "| rank | section | row | basis | " + " | ".join(f"{r:g}x" for r in card.ratios) + " |",
        "|" + "---|" * (4 + len(card.ratios)),
    ]
    for section in card.sections:
        errors = {
            e.ratio: f"{e.predicted:.4f} / {e.heldout:.4f}"
            + ("" if e.heldout_plain is msgspec.UNSET else f" / {e.heldout_plain:.4f}")
            for e in section.errors
        }
        cells = " | ".join(errors.get(ratio, "") for ratio in card.ratios)
        lines.append(
            f"| {section.rank} | {section.kind.upper()} group {section.group} "
            f"| {section.row_size} | {section.basis_rank} | {cells} |"
        )
    lines += ["", "Plans of rank 0, per row:", ""]
    for (group, kind), basis in fits[0].artifact.sections.items():
        plans = ", ".join(
            f"{ratio:g}x {describe_plan(basis.plans[ratio])}" for ratio in sorted(basis.plans)
        )
        lines.append(f"- {kind.upper()} group {group}: {plans}")
    lines += ["", "![variance, allocation, error](report.png)", ""]
    return "\n".join(lines)


def _ratios(card: ArtifactCard) -> str:
    """What they are of, in words."""
    if card.codec_name == Kvtc2Codec.name:
        return (
            f"of all bytes of blobs of {CHUNK_TOKENS} tokens, of calibration documents with their "
            "headers and sinks"
        )
    return "targets before DEFLATE"


def _budget(card: ArtifactCard) -> str:
    """How K and V divide the bits, in words."""
    if card.key_share is not None:
        return f"together; K has {card.key_share:.1%} of both"
    if any(section.kind == "kv" for section in card.sections):
        return "together, which share a basis"
    if card.codec_name == Kvtc2Codec.name:
        return "together; one step for both"
    if card.sensitivity is msgspec.UNSET:
        return "each"
    return "together; bits go to either where they save most weighted error"


def _sensitivity_lines(card: ArtifactCard) -> list[str]:
    if card.sensitivity is msgspec.UNSET:
        return []
    found = card.sensitivity
    return [
        f"- sensitivity: {found.method}, {found.tokens} tokens of {len(found.documents)} documents "
        f"(numbers {', '.join(map(str, found.documents))})"
        + ("" if found.averaged == "all" else ", sinks left out")
        + f"; one weight per {'layer' if found.metric == 'layer' else 'layer and head'} for K and "
        "for V, in the picture"
    ]


def _sink_lines(card: ArtifactCard) -> list[str]:
    if card.sinks is msgspec.UNSET:
        return []
    if not card.sinks:
        return ["- floating sinks: no layer shows any"]
    weights = card.sensitivity
    energy = ""
    if weights is not msgspec.UNSET and weights.marked_energy is not msgspec.UNSET:
        energy = f"; on them lies {weights.marked_energy:.0%} of the gradients' energy"
    return [
        f"- floating sinks, rank {sinks.rank}: {sinks.train_share:.2%} of the fitted and "
        f"{sinks.heldout_share:.2%} of the held-out tokens, in {sinks.documents:.0%} of the "
        f"documents, told by layers {', '.join(map(str, sinks.layers))}; mean log norm of V below "
        f"{sinks.threshold:.2f}, modes {sinks.separation:.2f} nats apart, density in the valley "
        f"{sinks.valley:.2f} of the lower mode's{energy}"
        for sinks in card.sinks
    ]


def _curve_lines(card: ArtifactCard) -> list[str]:
    if card.curve is msgspec.UNSET:
        return []
    found = card.curve
    points = ", ".join(
        f"{p.ratio:g}x {p.kl:.5f} [{p.low:.5f}, {p.high:.5f}] at a real ratio of {p.real_ratio:.1f}"
        for p in found.points
    )
    return [
        f"- KL in nats per token, {len(found.documents)} held-out documents, up to "
        f"{found.prefix_tokens} tokens of prefix, {found.exact_tokens} exact, "
        f"{found.scored_tokens} scored: {points}"
    ]


def _plot(path: Path, card: ArtifactCard, fit: RankFit) -> None:
    # Imported here: matplotlib takes a second, and only writing a report needs it. The figure
    # is made without pyplot, which would pick a backend and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sensitivity = card.sensitivity
    panels: list[Callable[[Axes], None]] = [
        partial(_plot_variance, fit=fit),
        partial(_plot_error, fit=fit),
        *(partial(_plot_allocation, fit=fit, name=name) for name in fit.artifact.section_names),
    ]
    if sensitivity is not msgspec.UNSET:
        panels.append(partial(_plot_weights, sensitivity=sensitivity))
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{card.model_name}, rank 0 of {card.tp_size}")
    for axes, panel in zip_longest(figure.subplots(rows, 2).flat, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            panel(axes)
    figure.savefig(path, dpi=110)


def _plot_weights(axes: Axes, sensitivity: SensitivityCard) -> None:
    axes.plot(sensitivity.key_weights, "o-", markersize=3, label="K")
    axes.plot(sensitivity.value_weights, "s--", markersize=3, label="V")
    axes.set(title="weight of rows", xlabel="layer", yscale="log")
    axes.legend(fontsize="small")


def _plot_variance(axes: Axes, fit: RankFit) -> None:
    for (group, kind), detail in fit.sections.items():
        if detail.total_variance > 0:
            left = 1 - detail.variance.cumsum(0) / detail.total_variance
            label = f"{kind.upper()} group {group}"
            axes.plot(left.clamp_min(1e-9).numpy(), _STYLE[kind], color=f"C{group}", label=label)
    axes.set(title="variance left out", xlabel="directions kept", ylabel="fraction", yscale="log")
    axes.legend(fontsize="small")


def _plot_error(axes: Axes, fit: RankFit) -> None:
    for (group, kind), section in fit.artifact.sections.items():
        ratios = sorted(section.plans)
        measured = [section.heldout_error[ratio] for ratio in ratios]
        predicted = [section.plans[ratio].expected_error for ratio in ratios]
        label = f"{kind.upper()} group {group}"
        axes.plot(ratios, measured, _STYLE[kind] + "o", color=f"C{group}", label=label)
        axes.plot(ratios, predicted, "x", color=f"C{group}")
    axes.set(
        title="relative squared error: o held out, x predicted",
        xlabel="target ratio",
        xscale="log",
        yscale="log",
    )
    ticks = fit.artifact.ratios()
    axes.set_xticks(ticks, labels=[f"{ratio:g}x" for ratio in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")


def _plot_allocation(axes: Axes, fit: RankFit, name: SectionName) -> None:
    """First layer group: one line per ratio."""
    section = fit.artifact.sections[0, name]
    for ratio in sorted(section.plans):
        bits = bits_per_coefficient(section.plans[ratio], section.basis.shape[1])
        axes.step(range(1, len(bits) + 1), bits.numpy(), where="mid", label=f"{ratio:g}x")
    axes.set(
        title=f"{name.upper()} group 0: bits per coefficient before entropy coding",
        xlabel="coefficient",
        xscale="log",
        ylim=(0, None),
    )
    axes.legend(fontsize="small")
