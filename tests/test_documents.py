"""What the documents say is so: commands parse, links lead somewhere, figures have a result.

Figures on quality are in `test_quality_figures`.
"""

from __future__ import annotations

import argparse
import json
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
