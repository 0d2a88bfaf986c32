"""What the documents say is so: commands parse, links lead somewhere, figures have a result."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.demo.__main__ import BUDGET_SHARE, BUDGET_UNIT, RECOMPUTE, ROOMY, RUNS
from benchmarks.demo.conversations import RunReport
from benchmarks.demo.report import markdown, side_by_side
from benchmarks.equal_kl import Factor, factors, read_curve
from benchmarks.reliability import holds
from kvtc_vllm.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "FORMAT.md", ROOT / "configs" / "README.md", *ROOT.glob("docs/*.md")]


def code_blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def kvtc_commands() -> list[tuple[str, ...]]:
    """Every `kvtc ...` at the start of a line of a code block or inside $(...)."""
    found: dict[tuple[str, ...], None] = {}
    for page in PAGES:
        for block in code_blocks(page):
            for text in re.findall(r"^kvtc .*|(?<=\$\()kvtc [^)]*", block, re.MULTILINE):
                if " N " not in text and not text.startswith("kvtc config lmcache fs model"):
                    found[tuple(shlex.split(text, comments=True)[1:])] = None
    return list(found)


def test_commands_are_found_in_the_documents() -> None:
    assert set(COMMANDS) == {words[0] for words in kvtc_commands()}


@pytest.mark.parametrize("words", kvtc_commands(), ids=" ".join)
def test_commands_in_the_documents_parse(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command, *arguments = words
    parser = argparse.ArgumentParser(exit_on_error=False)
    COMMANDS[command].add_arguments(parser)
    parser.parse_args(arguments)
    if command == "config":
        assert main(list(words)) == 0
        assert capsys.readouterr().out


def test_the_lmcache_command_prints_two_commands(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(
        r"^kvtc config lmcache fs .*", (ROOT / "docs/lmcache.md").read_text(), re.M
    )
    assert main(shlex.split(text)[1:]) == 0
    server, engine = capsys.readouterr().out.splitlines()
    assert server.startswith("lmcache server ")
    assert "--server-module" in server
    assert engine.startswith("vllm serve MODEL --kv-transfer-config")


def test_options_named_in_the_table_of_calibration_exist() -> None:
    parser = argparse.ArgumentParser()
    COMMANDS["calibrate"].add_arguments(parser)
    page = (ROOT / "docs" / "calibrating.md").read_text()
    named = re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)
    assert len(named) >= 5
    for option in named:
        assert option in parser.format_help()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            # As GitHub makes them: no punctuation, hyphens for spaces.
            names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in names


def test_the_python_example_runs() -> None:
    (example,) = code_blocks(ROOT / "docs" / "quick-start.md", "python")
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    ratio = float(result.stdout.split()[0])
    assert 8 < ratio < 32


def test_the_table_of_the_readme_and_the_answers_are_those_of_the_demo() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    runs = msgspec.convert(report["runs"], dict[str, RunReport])
    readme = README.read_text()
    assert list(runs) == list(RUNS)
    assert markdown(runs, report["conversations"], RECOMPUTE) in readme
    assert side_by_side(report["sample"]) in (ROOT / "docs" / "performance.md").read_text()
    least, most = report["context_tokens"]
    assert f"{least:,} to {most:,} tokens" in readme


def test_the_budget_of_the_demo_is_one_in_which_raw_thrashes() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    runs = msgspec.convert(report["runs"], dict[str, RunReport])
    budget = runs["raw"].budget_bytes
    assert budget == runs["kvtc2-16x"].budget_bytes == runs["kvtc2-32x"].budget_bytes
    assert budget == pytest.approx(runs[ROOMY].raw_bytes / BUDGET_SHARE, abs=BUDGET_UNIT)
    assert runs["raw"].conversations_resident < report["conversations"]
    assert runs[ROOMY].conversations_resident == report["conversations"]


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


def test_the_table_of_store_policies_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = json.loads((ROOT / "benchmarks/results/store_policy.json").read_text())["rows"]
    found: dict[tuple[str, float], list[str]] = {}
    bursts: dict[int, list[str]] = {}
    for row in rows:
        if row["trace"] == "bursts":
            counts = (row["encoded_chunks"], row["no_room_chunks"])
            cell = ", ".join(f"{count:,.0f}" for count in counts)
            bursts.setdefault(row["memory_chunks"], []).append(
                f"{100 * row['hit_share']:.1f} %, {cell}"
            )
        elif row["policy"] in ("raw eager", "eager", "auto", "auto exclusive"):
            cell = f"{100 * row['hit_share']:.1f} %, {row['encoded_chunks']:,.0f}"
            again = row["reencoded_chunks"]
            cell += f" ({again:,.0f} again)" if again else ""
            found.setdefault((row["trace"], row["working_set"]), []).append(cell)
    assert len(found) == 12
    for (trace, size), cells in found.items():
        assert f"| {trace}, {size}x | {' | '.join(cells)} |" in page
    assert len(bursts) == 3
    for memory, cells in bursts.items():
        assert f"| {memory} chunks | {' | '.join(cells)} |" in page
    assert all(row["lost_chunks"] == 0 for row in rows)


def test_the_table_of_python_s_lock_is_the_committed_one() -> None:
    found = json.loads((ROOT / "benchmarks/reliability/holds.json").read_text())
    assert set(found) == {"before", "after"}
    assert holds.markdown(found) in (ROOT / "docs" / "disk.md").read_text()


def test_holds_with_short_turns_are_the_committed_ones() -> None:
    path = ROOT / "benchmarks/reliability/holds_short_turns.json"
    (parts,) = json.loads(path.read_text()).values()
    rows = {
        name: row["longest, ms"]
        for part in parts.values()
        for name, row in part.items()
        if isinstance(row, dict)
    }
    said = (
        f"a plain loop {rows['a plain loop']:.1f} ms, a start without a list "
        f"{rows['start without a list']:.1f}, the list {rows['list of files']:.1f}, "
        f"a start with one {rows['start with a list']:.1f} at most"
    )
    assert said in (ROOT / "docs" / "disk.md").read_text()


def test_throughput_before_cache_groups_and_now_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    found = json.loads((ROOT / "benchmarks/reliability/overhead_before.json").read_text())
    for workload in ("never reused", "fits the GPU cache"):
        for tiers in ("memory", "memory and disk"):
            row = found["results"][workload][f"{tiers}: now over before"]
            least, most = row["ratio_least"], row["ratio_most"]
            assert f"{row['ratio']:.2f} [{least:.2f}, {most:.2f}]" in page


def test_the_table_of_starts_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "disk.md").read_text()
    found = json.loads((ROOT / "benchmarks/reliability/scan_time.json").read_text())
    assert found["chunks"] == 1_000_000
    for way in ("without a list", "with a list"):
        for state in ("warm", "cold"):
            row = found[way][state]
            cells = [
                f"{row[tree]['elapsed, s']:.1f} ({row[tree]['processor, s']:.1f})"
                for tree in ("before", "now")
            ]
            assert f"| {way} | {state} | {' | '.join(cells)} |" in page


def test_waits_of_an_engine_that_rests_are_the_committed_ones() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    path = ROOT / "benchmarks/reliability/load_queue_resting.json"
    found = json.loads(path.read_text())
    on, off = (found["tier as it is"][f"load_gate {gate}"] for gate in ("on", "off"))
    waits = [
        (row["median wait / recomputation"], *row["longest wait / recomputation"])
        for row in (on, off)
    ]
    (median, longest), (median_off, longest_off) = waits
    said = f"median wait was {median:.2f} and the longest {longest:.2f}, with it off"
    assert f"{said} {median_off:.2f} and {longest_off:.2f}." in page
    firsts = [f"{row['mean first token / computed']:.2f}" for row in (on, off)]
    assert f"first token took {firsts[0]} and {firsts[1]} of the computed burst's" in page
    for row in (on, off):
        (loads,) = row["loads"]
        assert loads == found["requests"] == 32
        assert round(row["waits above recomputation, %"] * loads / 100) == 2


@pytest.mark.parametrize(
    ("requests", "name"), [(32, "load_queue_processor"), (64, "load_queue_processor_64")]
)
def test_waits_in_processor_time_are_the_committed_ones(requests: int, name: str) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    found = json.loads((ROOT / f"benchmarks/reliability/{name}.json").read_text())
    assert found["complete"]
    for gate in ("on", "off"):
        row = found["tier as it is"][f"load_gate {gate}"]
        for measure, waits in (("clock", row), ("processor", row["in processor time"])):
            cells = (
                found["requests"],
                gate,
                row["loads"][0],
                measure,
                f"{waits['median wait / recomputation']:.2f}",
                f"{waits['longest wait / recomputation'][0]:.2f}",
                f"{waits['waits above recomputation, %']:g} %",
                f"{waits['worst first token / computed']:.2f}",
                f"{waits['mean first token / computed']:.2f}",
            )
            assert cells[0] == requests
            assert f"| {' | '.join(map(str, cells))} |" in page


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


def test_the_table_below_lmcache_is_the_committed_one() -> None:
    page = (ROOT / "docs" / "lmcache.md").read_text()
    rows = set(re.findall(r"^\| .* \| (\S+) \| (\d+) % \| (\d+) % \|$", page, re.MULTILINE))
    methods = json.loads((ROOT / "benchmarks/lmcache/compare.json").read_text())["methods"]
    known = {
        (
            f"{m['ratio']:.1f}",
            f"{100 * m['relative_error_k']:.0f}",
            f"{100 * m['relative_error_v']:.0f}",
        )
        for m in methods
    }
    assert len(rows) == 5
    assert rows <= known


def test_metrics_and_log_lines_of_the_page_on_serving_are_in_the_source() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    metrics = (ROOT / "kvtc_vllm" / "offload" / "stats.py").read_text()
    names = set(re.findall(r"`vllm:kvtc_([a-z_]+?)(?:_total)?`", page))
    assert len(names) >= 8
    for name in names:
        assert f'"{name}"' in metrics
    files = (
        path for part in ("connector", "offload") for path in ROOT.glob(f"kvtc_vllm/{part}/*.py")
    )
    source = "".join(path.read_text() for path in files)
    source = re.sub(r'"\n\s+"', "", source)
    lines = re.findall(r"^kvtc: .*$", page, re.MULTILINE)
    assert len(lines) == 2
    for words in ("kvtc: self-test %d tokens: ratio", "kvtc: rank %d/%d codec %s %gx"):
        assert words in source
        assert any(line.startswith(words.split(" %")[0]) for line in lines)


def test_launches_on_the_page_of_the_gpu_are_those_counted() -> None:
    rows = json.loads((ROOT / "benchmarks/results/gpu/launches.json").read_text())
    page = (ROOT / "docs/gpu.md").read_text()
    table = re.findall(r"^\| (kvtc2?), (\d) layers per group.*? \| (.+) \|$", page, re.MULTILINE)
    assert len(table) == 3
    for codec, layers, cells in table:
        wanted = [row for row in rows if (row["codec"], row["layers"]) == (codec, int(layers))]
        assert [row["tree"] for row in wanted] == ["before", "after"]
        counted = [
            [row[f"{way}_launches"]["all"] for row in wanted]
            if sort == "triton"
            else [row[f"{way}_torch_calls"][sort] for row in wanted]
            for way in ("load", "store")
            for sort in ("triton", "products", "work")
        ]
        assert cells.split(" | ") == [f"{before}, {after}" for before, after in counted]
