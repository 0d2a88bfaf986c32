"""Draws what the other scripts measured.

    python -m benchmarks.gpu.plots [--results FILE [FILE ...]] [--out DIR]

codec.png: encode and decode of version 1 by stage, against the machine's floors and the paper's
figures.
load.png: time of a load against copying the raw KV and recomputing it. serving.png: time to first
token by number of conversations. Benches without rows are left out; of rows for the same case the
last counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import RESULTS

Row = dict[str, Any]

ENCODE_STAGES = ("gather", "encode_product", "quantise_pack", "deflate")
DECODE_STAGES = ("verify", "upload_inflate", "unpack_dequantise", "decode_product", "scatter")
PAPER_GBPS = {
    "encode": 28,
    "encode_product": 70,
    "quantise_pack": 160,
    "deflate": 78,
    "decode": 40,
    "upload_inflate": 168,
    "unpack_dequantise": 290,
    "decode_product": 69,
}
"""Raw-equivalent GB/s from Table 5 of the paper: Mistral NeMo 12B, 8 x 8K tokens, one H100."""
GOALS_GBPS = {"encode": 80, "decode": 120}
MODES = {
    "none": ("recompute", "#808080"),
    "native": ("vLLM's offload, raw", "#c07820"),
    "raw": ("ours, raw", "#e0b060"),
    "kvtc-8x": ("kvtc 8x", "#3b6ea5"),
    "kvtc-16x": ("kvtc 16x", "#2a7f62"),
    "kvtc2-16x": ("kvtc2 16x", "#7f2a62"),
}
FIRST = RESULTS.parent / "h100.json"
"""Rows of the first machine."""


def main() -> None:
    """Draw every plot there are rows for."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.plots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--results", type=Path, nargs="+", default=[FIRST], help="of one machine")
    parser.add_argument("--out", type=Path, help="default: beside the first of the results")
    args = parser.parse_args()
    rows = [row for file in args.results for row in json.loads(file.read_text())]
    for path in draw(rows, args.out or args.results[0].parent):
        print(path)


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw what the rows allow; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[Sequence[Row]], Any]] = {
        "codec.png": _codec,
        "load.png": _load,
        "serving.png": _serving,
    }
    written: list[Path] = []
    for name, make in plots.items():
        figure = make(rows)
        if figure is not None:
            figure.savefig(directory / name, dpi=120)
            written.append(directory / name)
    return written


def _codec(rows: Sequence[Row]) -> Any:
    """One panel for encoding, one for decoding: the whole, then its stages."""
    measured = _version_1(rows)
    if not measured:
        return None
    row = next((r for r in reversed(measured) if _is_headline(r)), measured[0])
    floors = _floors(rows, row)
    copies = [r["gbps"] for r in _of(rows, "raw_copy")]
    copy = {"decode": max(copies)} if copies else {}
    figure, axes = _figure(1, 2, (11, 4))
    for axis, whole, stages in zip(
        axes[0], ("encode", "decode"), (ENCODE_STAGES, DECODE_STAGES), strict=True
    ):
        timed = row.get("stage_ms", {})
        names = [whole, *(stage for stage in stages if timed.get(stage))]
        rates = [row[f"{whole}_gbps"]]
        rates += [row["raw_bytes"] / timed[stage] / 1e6 for stage in names[1:]]
        places = range(len(names))
        colours = ["#2a7f62", *["#3b6ea5"] * (len(names) - 1)]
        axis.barh(list(places), rates, color=colours)
        for known, label, style in (
            (floors, "the machine's bound", "k|"),
            (copy, "copy of the raw KV", "md"),
            (PAPER_GBPS, "paper, H100", "rx"),
            (GOALS_GBPS, "goal", "g^"),
        ):
            points = [(known[name], place) for place, name in enumerate(names) if name in known]
            if points:
                axis.plot(*zip(*points, strict=True), style, ms=9, label=label)
        labels = [
            f"{n.replace('_', ' ')}  {rate:.0f}" for n, rate in zip(names, rates, strict=True)
        ]
        axis.set_yticks(list(places), labels)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.margins(x=0.1)
        axis.set_xlabel("GB/s of raw KV")
        axis.set_title(whole)
    _legend(figure, axes)
    figure.suptitle(f"{_case_name(row)}, {row['load_tokens']} tokens", fontsize=10)
    return figure


def _floors(rows: Sequence[Row], row: Row) -> dict[str, float]:
    """What bounds a stage, in GB/s of raw KV, from the last measured rates of the machine."""
    found: dict[str, float] = {}
    raw = row["raw_bytes"]
    for floor in _of(rows, "floor"):
        # The device copy counts bytes read and bytes written.
        found |= dict.fromkeys(("gather", "scatter"), floor["device_copy_gbps"] / 2)
        product = raw / (row["product_flops"] / (floor["float16_tflops"] * 1e12)) / 1e9
        found |= dict.fromkeys(("encode_product", "decode_product"), product)
    copies = _of(rows, "raw_copy")
    if copies:
        rate = max(copy["gbps"] for copy in copies)
        found["upload_inflate"] = rate * raw / row["stored_bytes"]
    return found


def _load(rows: Sequence[Row]) -> Any:
    """Milliseconds by tokens."""
    codec = _version_1(rows)
    headline = next((r for r in codec if _is_headline(r)), codec[0] if codec else None)
    same = ("shape", "plan", "layers_per_group", "chunk_tokens", "precision", "coder", "tf32")
    loads = [r for r in codec if headline and all(r.get(k) == headline.get(k) for k in same)]
    copies = _of(rows, "raw_copy")
    lines = [
        (_points(_of(rows, "recompute"), "ms"), "recompute", "#808080", "o-"),
        (_points(copies, "by_block_ms"), "raw, a copy a block", "#c07820", "o-"),
        (_points(copies, "ms"), "raw, one copy", "#e0b060", "o-"),
        (_points(loads, "decode_ms"), "kvtc decode", "#2a7f62", "o-"),
        (_points(loads, "encode_ms"), "kvtc encode", "#3b6ea5", "o--"),
    ]
    lines = [line for line in lines if line[0]]
    if not lines:
        return None
    figure, axes = _figure(1, 1, (6.5, 4.5))
    axis = axes[0][0]
    for points, label, colour, style in lines:
        axis.plot(*zip(*points, strict=True), style, label=label, color=colour, ms=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms")
    axis.set_title(_case_name(headline) if headline else "", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    return figure


def _serving(rows: Sequence[Row]) -> Any:
    """A line of panels a model: time to first token, throughput, tokens reloaded."""
    measured = [r for r in _of(rows, "serving") if "ttft_mean_s" in r]
    if not measured:
        return None
    models = list(dict.fromkeys(r["model"] for r in measured))
    figure, axes = _figure(len(models), 3, (13, 3.8 * len(models)))
    for line, model in zip(axes, models, strict=True):
        own = [r for r in measured if r["model"] == model]
        latency, rate, source = line
        for mode, (label, colour) in MODES.items():
            here = [r for r in own if r["mode"] == mode]
            mean, p95 = (_points(here, k, "conversations") for k in ("ttft_mean_s", "ttft_p95_s"))
            if not mean:
                continue
            latency.plot(*zip(*mean, strict=True), "o-", color=colour, label=label, ms=4)
            latency.plot(*zip(*p95, strict=True), ":", color=colour)
            points = _points(here, "turns_per_s", "conversations")
            rate.plot(*zip(*points, strict=True), "o-", color=colour, label=label, ms=4)
            share = {
                r["conversations"]: 100 * r["computed_tokens"] / r["prompt_tokens"] for r in here
            }
            source.plot(*zip(*sorted(share.items()), strict=True), "o-", color=colour, ms=4)
        budget = own[-1]["budget_bytes"] / 2**30
        latency.set_title(f"{model}: TTFT of returns, s (dotted: p95)", fontsize=10)
        latency.set_yscale("log")
        rate.set_title(f"answers a second; {budget:.3g} GiB of host memory each", fontsize=10)
        source.set_title("% of prompt tokens computed anew", fontsize=10)
        for axis in line:
            axis.set_xlabel("conversations")
            axis.grid(alpha=0.3)
        for axis in (rate, source):
            axis.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, below them."""
    known = [axis.get_legend_handles_labels() for axis in axes.flat]
    entries = {label: handle for pair in known for handle, label in zip(*pair, strict=True)}
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=5, fontsize=8
        )


def _version_1(rows: Sequence[Row]) -> list[Row]:
    """What was measured of it, not in an older tree."""
    measured = _of(rows, "codec")
    return [r for r in measured if r.get("codec", "kvtc") == "kvtc" and "tree" not in r]


def _of(rows: Sequence[Row], bench: str) -> list[Row]:
    return [row for row in rows if row.get("bench") == bench]


def _points(rows: Sequence[Row], key: str, by: str = "load_tokens") -> list[tuple[float, float]]:
    """(x, y) by rising x; the last row of an x counts."""
    return sorted({row[by]: row[key] for row in rows}.items())


def _is_headline(row: Row) -> bool:
    case = (row["shape"], row["plan"], row["layers_per_group"], row["chunk_tokens"])
    return case == ("llama-3.1-8b", 16.0, 8, 128) and row["load_tokens"] == 8192


def _case_name(row: Row) -> str:
    return (
        f"{row['shape']}, plan {row['plan']:g}x, {row['layers_per_group']} layers a group, "
        f"{row['chunk_tokens']} tokens a chunk, "
        f"{row.get('machine', {}).get('device', '')}"
    )


if __name__ == "__main__":
    main()
