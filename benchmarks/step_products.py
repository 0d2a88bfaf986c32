"""What fewer multiplications cost codec 2: squared error at equal bytes, without a model.

    python -m benchmarks.step_products --spool DIR --work DIR [--layers 10] [--ratios 16]
                                       [--out benchmarks/results/step-products.json]

The first layer group of a spool, K and V with one basis, is fitted in several ways to the same
rows, with weights and rule of sinks by the spool's sensitivity.json: whole bases whose columns must
save more bits per token to be coded (`StepSettings.column_bits`), and bases in parts
(`calibration.parts`). Plans meet the target ratio with real bytes of blobs of 128 tokens, marked
sinks included. *error*: squared, of
weighted rows of ordinary tokens that plans are fitted to, over that of the first way at this ratio.
*products*: millions of multiplications with an addition per token, one direction, zeros left out;
*beyond*: more for a marked token. *packed*: bytes per token before DEFLATE, escapes left out. Bases
are kept in --work. To second order, KL is in proportion to the error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.sensitivity import ROOT
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.parts import TURNED
from kvtc_vllm.calibration.section_fit import SectionFitter
from kvtc_vllm.calibration.sensitivity import SENSITIVITY_NAME, load_sensitivity
from kvtc_vllm.calibration.shards import RankRows
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.step_classes import Sample, StepSettings
from kvtc_vllm.calibration.step_fit import overhead_bytes, sample_index, sink_marks
from kvtc_vllm.calibration.step_plans import make_step_plans
from kvtc_vllm.calibration.weights import RowWeights, finer_steps
from kvtc_vllm.codec.v2.codec import ENTROPY
from kvtc_vllm.codec.v2.plan import StepPlan


@dataclass(frozen=True)
class Way:
    """bits: see `StepSettings.column_bits`. parts, turned: see `FitSettings`."""

    bits: float = StepSettings.column_bits
    parts: int = 1
    turned: float = TURNED

    @property
    def name(self) -> str:
        basis = "whole" if self.parts == 1 else f"{self.parts} parts, {self.turned:.3f} turned"
        return f"{basis}, {self.bits:g} bits"


WAYS = (
    Way(),
    Way(parts=2),
    Way(bits=2.0),
    Way(bits=4.0),
)


@dataclass(frozen=True)
class Group:
    """The rows of a layer group. overhead: bytes per token of a blob besides its coded sections.
    gain: of sinks."""

    source: RankRows
    settings: FitSettings
    index: torch.Tensor
    marks: torch.Tensor
    overhead: float
    gain: float


def main() -> None:
    """Fit what is not there, print a table, write JSON after every way."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.step_products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--spool", type=Path, required=True, help="of kvtc calibrate --sensitivity gradient")
    add("--work", type=Path, required=True, help="directory for bases, which are kept")
    add("--layers", type=int, default=10, help="per layer group")
    add("--rows", type=int, default=24_000, help="to fit bases to, at most")
    add("--ratios", default="16", help="target ratios")
    add("--out", type=Path, default=ROOT / "benchmarks/results/step-products.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    group = read_group(args.spool, args.layers, args.rows)
    about = {
        "command": "python -m benchmarks.step_products --spool DIR --work DIR "
        f"--layers {args.layers} --rows {args.rows} --ratios {args.ratios}",
        "rows_of": group.source.geometry.row_size(0, "kv"),
        "marked_of_sample": f"{int(group.marks.sum())} of {len(group.marks)}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 used",
        "versions": {p: version(p) for p in ("kvtc-vllm", "torch")},
        "unit": "error and products over those of the first way at the same ratio",
    }
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for way in WAYS:
        for row in measured(way, group, ratios, args.work):
            first = next((r for r in rows if r["target_ratio"] == row["target_ratio"]), row)
            row["error_over_first"] = round(row["error"] / first["error"], 3)
            row["products_over_first"] = round(row["products"] / first["products"], 3)
            rows.append(row)
            print(*(f"{name} {value}" for name, value in row.items()), flush=True)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def read_group(spool: Path, layers: int, rows: int) -> Group:
    """The first layer group, of so many layers."""
    reader = SpoolReader(spool / "rank0")
    source = RankRows([reader], 1, 0, layers)
    found = load_sensitivity(
        spool / SENSITIVITY_NAME, source.geometry.num_layers, reader.header.total_kv_heads
    )
    rule = None if found.marked is None else found.marked.rule
    weights = RowWeights(found, "all" if rule is None else "ordinary")
    settings = FitSettings(codec="kvtc2", weights=weights, paired=True, train_rows=rows)
    index = sample_index(source, settings, torch.Generator().manual_seed(settings.seed))
    groups = len(source.geometry.layer_groups)
    return Group(
        source,
        settings,
        index,
        sink_marks(source, source.geometry, index, rule),
        # Of all layer groups.
        overhead_bytes(source, source.geometry, 4, rule, ENTROPY) / groups,
        finer_steps(found) or StepSettings.sink_gain,
    )


def measured(way: Way, group: Group, ratios: list[float], work: Path) -> Iterator[dict[str, Any]]:
    """A row per ratio."""
    sample, used, outside = sample_of(way, group, work)
    steps = StepSettings(sink_gain=group.gain, column_bits=way.bits)
    silent = lambda stage, done, total: None  # noqa: E731
    for ratio in ratios:
        (found,) = make_step_plans(
            [sample], group.marks, [ratio], group.overhead, ENTROPY, steps, silent
        )
        plan = found[ratio]
        yield {
            "way": way.name,
            "target_ratio": ratio,
            "columns": plan.rank,
            "columns_beyond": plan.total_rank - plan.rank,
            "products": round(float(used[: plan.rank].sum()) / 1e6, 2),
            "products_beyond": round(float(used[plan.rank : plan.total_rank].sum()) / 1e6, 2),
            "packed": sum(part.packed_bytes(128) for part in plan.packed) // 128,
            "error": round(error(plan, sample.coefficients, outside, ~group.marks), 4),
        }


def sample_of(way: Way, group: Group, work: Path) -> tuple[Sample, torch.Tensor, torch.Tensor]:
    """Coefficients of the sample; elements of every column that are not 0, int64 [r]; what each
    row has outside the columns, squared."""
    kept = work / f"products-{way.parts}-{way.turned:.3f}.pt"
    if not kept.exists():
        settings = FitSettings(
            codec="kvtc2",
            weights=group.settings.weights,
            paired=True,
            train_rows=group.settings.train_rows,
            method="eigh",
            parts=way.parts,
            turned=way.turned,
        )
        geometry = group.source.geometry
        fitter = SectionFitter(group.source, geometry, 0, "kv", 1.0, settings, None)
        sample = fitter.sample(group.index)
        basis = fitter.basis
        assert basis.weights is not None
        rows = (group.source.take(0, "kv", group.index) - basis.mean) * basis.weights
        outside = rows.square().sum(1) - sample.coefficients.square().sum(1)
        work.mkdir(parents=True, exist_ok=True)
        torch.save((sample, (basis.basis != 0).sum(0), outside.clamp_min(0.0)), kept)
    # Our own file.
    found: tuple[Sample, torch.Tensor, torch.Tensor] = torch.load(kept, weights_only=False)
    return found


def error(
    plan: StepPlan, coefficients: torch.Tensor, outside: torch.Tensor, counted: torch.Tensor
) -> float:
    """Mean squared error per row. counted: bool [n], which rows count."""
    own = coefficients[counted]
    restored = plan.restore(plan.quantise(own))
    coded = (own[:, : plan.rank] - restored).double().square().sum(1)
    dropped = own[:, plan.rank :].double().square().sum(1)
    return float((coded + dropped + outside[counted].double()).mean())


if __name__ == "__main__":
    main()
