"""Results of variants measured one at a time, and factors of their KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.sensitivity_ablations import compare, kept_rows, write_results


def row(variant: str, *divergence: float) -> dict[str, Any]:
    return {
        "kind": "essays",
        "variant": variant,
        "target_ratio": 32.0,
        "by_document": list(divergence),
    }


def about(variant: str, rows: int = 100) -> dict[str, Any]:
    return {"command": "run", "variants": {variant: "told"}, "rows_fitted": rows}


def test_variants_are_added_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert kept_rows(out, about("none"), ["none"]) == []
    write_results(out, about("none"), ["essay 3"], [row("none", 1.0)])

    told = about("layer")
    assert kept_rows(out, told, ["layer"]) == [row("none", 1.0)]
    assert told["variants"] == {"none": "told", "layer": "told"}
    assert kept_rows(out, about("none"), ["none"]) == []


def test_variants_measured_in_another_way_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    write_results(out, about("none"), ["essay 3"], [row("none", 1.0)])
    with pytest.raises(SystemExit, match="another rows_fitted; give another --out"):
        kept_rows(out, about("layer", rows=200), ["layer"])


def test_factors_are_of_pairs_of_documents() -> None:
    # Documents differ by far more than the variants do, and all in the same direction.
    table = [row("none", 1.0, 10.0, 100.0), row("layer", 0.5, 5.0, 50.0)]
    compare(table, "none")
    assert table[0]["factor"] == [1.0, 1.0, 1.0]
    assert table[1]["factor"] == [0.5, 0.5, 0.5]


def test_there_is_no_factor_without_the_same_documents() -> None:
    table = [row("layer", 0.5, 5.0), row("none", 1.0)]
    compare(table, "none")
    assert "factor" not in table[0]
