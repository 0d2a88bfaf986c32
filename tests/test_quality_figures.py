"""Figures on quality, and on what codecs take on a CPU, are those of committed results."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from benchmarks.equal_kl import Factor, factors, read_curve

ROOT = Path(__file__).resolve().parent.parent


def test_every_divergence_in_the_page_on_quality_is_in_a_result() -> None:
    results = "".join(path.read_text() for path in ROOT.glob("benchmarks/quality/**/results.md"))
    turns = json.loads((ROOT / "benchmarks/quality/methods/results.json").read_text())["rows"]
    fusion = json.loads((ROOT / "benchmarks/results/joint_fusion.json").read_text())["rows"]
    known = set(re.findall(r"\d\.\d{4}\b", results)) | {f"{r['value']:.4f}" for r in turns}
    known |= {f"{value:.4f}" for r in fusion for value in (r["kl"], *r["interval"])}
    for row in json.loads((ROOT / "benchmarks/results/basis-bits.json").read_text())["rows"]:
        figures = (row["kl"], row["change"], *row["change_interval"])
        known |= {f"{abs(figure):.4f}" for figure in figures}
    page = (ROOT / "docs" / "quality.md").read_text()
    of_codec_2 = [
        figure
        for name in ("sensitivity*", "step-*", "stand-in-curves")
        for path in ROOT.glob(f"benchmarks/results/{name}.json")
        for row in json.loads(path.read_text()).get("rows", ())
        if "interval" in row
        for figure in (row["kl"], *row["interval"])
    ]
    known |= {f"{figure:.4f}" for figure in of_codec_2}
    known |= {f"{figure:.4f}" for figure in _by_kind_of_text()}
    layers = json.loads((ROOT / "benchmarks/results/step_layers.json").read_text())["rows"]
    known |= {f"{row['kl']:.4f}" for row in layers if "kl" in row}
    for path in ROOT.glob("benchmarks/results/probe-floor*.json"):
        known |= {f"{figure:.4f}" for figure in json.loads(path.read_text())["kl"].values()}
    quoted = set(re.findall(r"\d\.\d{4}\b", page))
    assert len(quoted) > 100
    # A share in percent has no such form; 0.0001 as "below 0.0001" is a bound, not a figure.
    assert quoted - known == set()
    finer = set(re.findall(r"\b0\.\d{5}\b", page))
    assert len(finer) > 50
    float32 = ROOT / "benchmarks/quality/smollm2/field/float32/results.json"
    below = [
        figure
        for row in json.loads(float32.read_text())["rows"]
        if row["metric"] == "kl"
        for figure in (row["value"], *row["ci95"])
    ]
    assert finer - {f"{figure:.5f}" for figure in (*of_codec_2, *below)} == set()


def _by_kind_of_text() -> list[float]:
    """Means over the essays and over the maths of the shipped artifact's page, at 16x."""
    means = []
    for name, artifact in (("shipped", "thirds"), ("kvtc2", "weighted")):
        report = json.loads((ROOT / f"benchmarks/results/sensitivity-{name}.json").read_text())
        (row,) = (
            row
            for row in report["rows"]
            if (row["artifact"], row["target_ratio"]) == (artifact, 16.0)
        )
        for kind in ("essay", "gsm8k"):
            pairs = zip(report["documents"], row["by_document"], strict=True)
            found = [kl for document, kl in pairs if document.startswith(kind)]
            means.append(sum(found) / len(found))
    return means


def test_the_factors_by_kind_of_text_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    lines = factors_by_kind()
    assert len(lines) == 14
    for line in lines:
        assert line in page


def factors_by_kind() -> list[str]:
    """Lines of the table of times fewer bytes at equal KL, by kind of text."""
    results = ROOT / "benchmarks/results"
    earlier, kinds = f"{results}/sensitivity-kvtc2.json", f"{results}/sensitivity-kinds.json"
    shared = f"{results}/sensitivity-shared"
    prompts = f"{shared}-prompts.json"
    lines = []
    for name, kind, before, file, beyond in (
        ("essays", "essay", earlier, f"{shared}-basis.json", f"{shared}-high.json"),
        ("maths", "gsm8k", earlier, f"{shared}-basis.json", f"{shared}-high.json"),
        ("code", "library", kinds, f"{shared}-kinds.json", f"{shared}-high-kinds.json"),
        ("retrieval", "kv-retrieval", kinds, f"{shared}-kinds.json", f"{shared}-high-kinds.json"),
        ("chats", "essay-chats", kinds, f"{shared}-kinds.json", f"{shared}-high-kinds.json"),
        ("variables", "essay-variables", None, prompts, None),
        ("needle", "essay-needle", None, prompts, None),
    ):
        base = read_curve(f"{before or prompts}:plain", kind)
        others = [f"{before}:weighted", f"{before}:kvtc2"] if before else []
        others += [f"{file}:each", f"{file}:shared"]
        columns = [factors(base, read_curve(other, kind)) for other in others]
        if beyond is not None:
            # An artifact of higher ratios, where those of the first end.
            higher = factors(base, read_curve(f"{beyond}:shared", kind))
            pairs = zip(columns[-1], higher, strict=True)
            columns[-1] = [more if own.ratio == math.inf else own for own, more in pairs]
        for number in range(2):
            cells = [factor_cell(found[number]) for found in columns]
            cells = ["not measured"] * (4 - len(cells)) + cells
            lines.append(f"| {name}, {base.ratios[number]:.1f}x | {' | '.join(cells)} |")
    return lines


def factor_cell(found: Factor) -> str:
    """With its interval; where the other's curve ends before, that it does."""
    if found.ratio in (0, math.inf):
        return ">" if found.ratio else "<"
    low = f"{found.low:.1f}" if found.low else "<"
    high = f"{found.high:.1f}" if found.high < math.inf else ">"
    return f"{found.value:.1f} [{low}, {high}]"


def test_the_table_of_differences_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    found = json.loads((ROOT / "benchmarks/results/joint_delta.json").read_text())["rows"]
    assert set(found) == {"shared", "edited", "agent", "chats"}
    for trace, rows in found.items():
        for row in rows:
            share, load = row["share_of_a_difference"], row["load_time_to_decoding"]
            cells = (
                f"{trace}, {row['target_ratio']:g}x",
                f"{row['differences']} of {row['chunks']}",
                f"{100 * row['saved']:.1f} %",
                "-" if share is None else f"{share:.2f}",
                f"{row['store_time_to_encoding']:.2f}",
                "-" if load is None else f"{load:.2f}",
            )
            assert f"| {' | '.join(cells)} |" in page


def test_the_tables_of_speed_are_the_committed_ones() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    for name in ("codec", "codec-smollm2"):
        for found in json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]:
            assert (
                f"| {found['codec']} | {found['way']} | {found['real_ratio']:.1f} | "
                f"{found['encode_mb_s']:.0f} | {found['decode_mb_s']:.0f} |"
            ) in page


def test_the_table_of_speed_by_layer_groups_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    for codec in ("kvtc-8x", "kvtc-16x", "kvtc-32x"):
        slow, batches, thirds, more = _speeds(codec, "codec-thirds.json")
        slow, batches, sixths, most = _speeds(codec, "codec-sixths.json")
        cells = (slow, batches, thirds, more, sixths, most)
        assert f"| {codec} | {' | '.join(cells)} |" in page


def _speeds(codec: str, file: str) -> tuple[str, str, str, str]:
    """Cells of the reference, of batches, of those of the other artifact, and of its gain."""
    rows = json.loads((ROOT / "benchmarks" / "results" / file).read_text())["rows"]
    of = {row["way"]: row for row in rows if row["codec"] == codec}
    ways = [of[way] for way in ("reference", "fast-batch", "other-batch")]
    encode, decode = ([way[f"{what}_mb_s"] for way in ways] for what in ("encode", "decode"))
    cells = [f"{out:.0f}, {back:.0f}" for out, back in zip(encode, decode, strict=True)]
    gain = f"{encode[2] / encode[0]:.1f}, {decode[2] / decode[0]:.1f}"
    return cells[0], cells[1], cells[2], gain


def test_the_table_against_fp8_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "quality.md").read_text()
    table = page.split("#### Against FP8, without the floor")[1].split("\n- ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if " 0.0" in line]
    results = ROOT / "benchmarks/quality/smollm2/field/float32/results.json"
    found = {
        (row["method"], row["task"], row["metric"]): row
        for row in json.loads(results.read_text())["rows"]
        if not row["label"]
    }
    methods = {"FP8": "fp8-e4m3", "QuantSpec, 8 bits": "quantspec-8bit"}
    told = 0
    for name, _, *cells in rows:
        method = methods.get(name, name.replace(",", ""))
        tasks = ("essays", "library", "maths", "kv-retrieval", "essay-variables")
        for task, cell in zip(tasks, cells, strict=False):
            if cell:
                kl = found[method, task, "kl"]
                low, high = kl["ci95"]
                assert cell.startswith(f"{kl['value']:.5f} [{low:.5f}, {high:.5f}]")
                share = re.search(r", (\d+)%$", cell)
                if share is not None:
                    right = found[method, task, "accuracy"]["value"]
                    assert share[1] == f"{100 * right:.0f}"
                told += 1
    assert told == 21
