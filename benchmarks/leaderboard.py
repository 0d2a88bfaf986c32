"""One page of all methods on SmolLM2, from committed results.

    python -m benchmarks.leaderboard

Reads the results.json files named below, of which the first is the reference: a later file's task
counts only where its exact run is of the same prompts. Writes docs/leaderboard.md, its picture, and
the sentences in docs/quality.md that say what the table takes. Nothing is measured.
`kvtc eval MODEL --quick` is the short form for any model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.table_seconds import PROBES, QUICK_OURS, about, estimate, quick
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.quick import quick_methods
from kvtc_vllm.evaluation.recall import RECALLS
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.leaderboard import Line, Task, joined, lines
from kvtc_vllm.evaluation.reporting.plot import plot
from kvtc_vllm.evaluation.reporting.results import EXACT, Row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/quality/smollm2"
SOURCES = (
    "methods",
    "shared-basis",
    "field/chunks",
    "field/whole",
    "field/settings",
    "field/below",
    "field/tokens",
    "field/composed",
    "field/float32",
)
FLOAT32 = "field/float32"
"""Through the tier like the codecs before it, with the model in float32; see `page`."""
MARK = "\\*"
"""Behind cells of `FLOAT32`."""
QUICK = ROOT / "benchmarks/quality/quick"
"""What `kvtc eval --quick` left for the stand-in."""
QUALITY = ROOT / "docs/quality.md"
PAGE = ROOT / "docs/leaderboard.md"
PICTURE = RESULTS / "field/leaderboard.png"
TASKS: dict[Task, str] = {
    ("essays", 640): "prose",
    ("library", 640): "code",
    ("maths", 640): "maths",
    ("kv-retrieval", 416): "retrieval",
    ("essay-variables", 360): "variables",
    ("essay-needle", 640): "needle",
    ("essay-chats", 1100): "chats",
}
RUNNING: tuple[Task, ...] = (("essays", 640), ("library", 640), ("maths", 640))
CURVE = tuple(f"kvtc2-{ratio}x ordinary" for ratio in (8, 16, 32, 64))
BIT_EXACT = "raw"
AGAIN = " each"
"""How names end of another fit of what the curve has."""
BELOW = "Below KVTC"


def main() -> None:
    """Write page and picture."""
    rows = read()
    PAGE.write_text(page(rows), encoding="utf-8")
    others = re.sub(r"(?m)^The whole table takes .*$", seconds(), QUALITY.read_text("utf-8"))
    QUALITY.write_text(others, encoding="utf-8")
    plot(PICTURE, [row for row in rows if "/" not in row.method and "+" not in row.method])
    print(f"{PAGE}, {PICTURE}")


def read() -> list[Row]:
    """Rows of all sources that are there, over the same prompts."""
    found = [report.read(RESULTS / source / "results.json") for source in SOURCES]
    rows = joined(found, list(TASKS))
    return [row for row in rows if row.method != BIT_EXACT and not row.method.endswith(AGAIN)]


def seconds() -> str:
    """What the table takes to measure, as this page and docs/quality.md have it."""
    probes = ", ".join(
        f"[{way}](../{(RESULTS / folder / 'results.md').relative_to(ROOT)})"
        for way, folder in PROBES.items()
    )
    return (
        f"The whole table takes {estimate(SOURCES).told()} (probes: {probes}). `kvtc eval MODEL "
        "--data DIR --quick`, every method on few short prompts, is estimated in the same way at "
        f"{quick() / 60:.0f} minutes of one core."
    )


def of_quick() -> str:
    """How many methods `QUICK` has, and how long its command took if that is known."""
    methods = quick_methods(QUICK_OURS)
    measured = {row.method for row in report.read(QUICK / "results.json")} & {*methods}
    some = "all" if len(measured) == len(methods) else f"{len(measured)} of"
    told = f"{some} its {len(methods)} methods for [the stand-in]"
    told += f"(../{(QUICK / 'results.md').relative_to(ROOT)})"
    said = about(QUICK)
    taken = said.get("seconds", {}).get(said["command"])
    if taken is None:
        return told
    minutes = {clock: f"{seconds / 60:.0f}" for clock, seconds in taken.items()}
    return (
        f"{told}, in {minutes['wall']} minutes on the clock, {minutes['processor']} of processor "
        "time"
    )


def of_float32(rows: Sequence[Row]) -> frozenset[tuple[str, Task]]:
    """Methods and tasks of `rows` whose figures are those of `FLOAT32`."""
    found = report.read(RESULTS / FLOAT32 / "results.json")
    own = [row for row in found if row.metric == "kl" and not row.label]
    return frozenset((row.method, (row.task, row.context)) for row in rows if row in own)


def page(rows: Sequence[Row]) -> str:
    """The page. rows: as `read` gives them."""
    marked = of_float32(rows)
    table = lines(rows, list(TASKS), RUNNING, CURVE, marked)
    exact = {
        (row.task, row.context): row.value
        for row in rows
        if row.method == EXACT and row.metric == "accuracy"
    }
    answers = ", ".join(f"{TASKS[task]} {value:.0%}" for task, value in exact.items())
    text = [
        "# Leaderboard",
        "",
        f"{len(table)} methods and settings on SmolLM2-135M-Instruct, over the same prompts: 8 of "
        "prose, code, maths and needle, 16 of retrieval and variables, two chats of four answers, "
        "of documents that no calibration and no tuning saw. Prompts have 640 tokens, those of "
        "retrieval 416, of variables 360, chats up to 1100. What a method keeps once per prompt "
        "weighs more here than in long contexts. "
        "A cell is KL to the exact run in nats per token, and the share of "
        f"right answers where there are some (exactly: {answers}). **Bold**: no other method has "
        "less KL at the same real ratio or more. This goes by means: so few prompts do not tell "
        "all neighbours apart ([which](../benchmarks/quality/smollm2/methods/front.md)). It is one "
        "small model, and what a larger one would say is not known. How it is measured: "
        "[quality](quality.md).",
        "",
        "*Real ratio*: KV over all bytes that are kept anywhere, with every scale, mask, index and "
        "basis of a prompt. *Read*: KV over what one query reads, for methods that keep everything "
        "and read some. *Codec 2*: how many times fewer bytes codec 2 keeps at the same KL on "
        "running text (prose, code, maths together), with two bases (*ordinary*); `>` and `<`: at "
        "least, at most, as its measured curve ends there. A shared basis (*shared*, the default "
        "of new fits) has less KL yet; *shipped* and *fine* have one, in three layer groups.",
        "",
        "*Codecs*, and FP8 below KVTC, ran through the tier in vLLM, in bfloat16. There rounding "
        "alone costs some 0.0015 on running text, so less than that says nothing "
        "([why](quality.md#the-floor-of-bfloat16)). "
        f"Cells with {MARK} ran so with the model in float32 and its KV rounded to bfloat16; they "
        "have no part in fronts. Of methods with such cells on running text *codec 2* is too "
        "small, since its own curve has that floor and they have not. All others ran "
        "in transformers, in float32, on prefixes of the same length; there `h2o/keep=1+kvtc-16x` "
        "drops nothing and is `kvtc-16x` again, as a check. What is dropped or chosen below KVTC "
        "is chosen once for all layers and heads ([why](composing.md#below-kvtc)). Intervals are "
        "in the results. CacheGen, SWAN, ReCalKV and ThinK were fitted on 8,192 tokens, KVTC on "
        "60,000 of more kinds ([more](composing.md#codecs-of-the-finished-kv)).",
        "",
    ]
    for title, own in _groups(table):
        tasks = [task for task in TASKS if any(task in line.kl for line in own)]
        head = ["method", "real ratio", "read", *(TASKS[task] for task in tasks), "codec 2"]
        text += [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        text += [_line(line, tasks, marked) for line in own]
        text += [""]
    text += [
        "## The picture",
        "",
        "Methods with their own settings, Pareto front dashed:",
        "",
        f"![KL against real ratio](../{PICTURE.relative_to(ROOT)})",
        "",
        "## Where it comes from",
        "",
        "`python -m benchmarks.leaderboard` makes this page from committed results: "
        + ", ".join(
            f"[{source}](../{(RESULTS / source / 'results.md').relative_to(ROOT)})"
            for source in SOURCES
        )
        + ". Each has the commands that measured it. Settings were swept on documents of the "
        "tuning part, those of codecs on prose alone ([sweep]"
        "(../benchmarks/quality/smollm2/field/sweep/README.md)). The best of a grid has a row "
        "beside the settings of the method's paper; where there is none, these are the best. "
        f"`kvtc eval MODEL --quick` measures every method on any model, on few short prompts: "
        f"{of_quick()}.",
        "",
        seconds(),
        "",
    ]
    return "\n".join(text)


def composed(rows: Sequence[Row]) -> list[str]:
    """Lines of the table of what is below KVTC, head included, as docs/composing.md has them."""
    text = page(rows).partition(f"## {BELOW}\n\n")[2]
    return text.partition("\n\n")[0].splitlines()


def _groups(table: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """Lines by kind of method."""
    kinds: dict[str, list[Line]] = {
        "Codecs": [],
        "Tokens dropped": [],
        "Tokens recalled": [],
        BELOW: [],
    }
    for line in table:
        first = line.method.split("+")[0].split("/")[0]
        if "+" in line.method:
            kinds[BELOW].append(line)
        elif first in EVICTIONS:
            kinds["Tokens dropped"].append(line)
        elif first in RECALLS:
            kinds["Tokens recalled"].append(line)
        else:
            assert first in BASELINES or first.startswith("kvtc")
            kinds["Codecs"].append(line)
    return [(title, own) for title, own in kinds.items() if own]


def _line(line: Line, tasks: Sequence[Task], marked: frozenset[tuple[str, Task]]) -> str:
    """tasks: which have a column. marked: as `of_float32` gives them."""
    low, high = f"{line.low:.1f}", f"{line.high:.1f}"
    cells = [line.method, low if low == high else f"{low}-{high}"]
    cells.append(f"{line.read:.1f}" if line.read else "")
    for task in tasks:
        texts = [f"{line.kl[task]:.4f}"] if task in line.kl else []
        if task in line.accuracy:
            texts.append(f"{line.accuracy[task]:.0%}")
        text = ", ".join(texts) + (MARK if texts and (line.method, task) in marked else "")
        cells.append(f"**{text}**" if task in line.on_front and text else text)
    cells.append("".join((a[0], f"{a[1]:.1f}x")) if (a := line.advantage) else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
