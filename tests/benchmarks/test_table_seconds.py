"""What the leaderboard's commands take, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import table_seconds
from benchmarks.table_seconds import Rates
from kvtc_vllm.evaluation.reporting import report
from kvtc_vllm.evaluation.reporting.results import EXACT, SECONDS, Row

RATES = {
    "tier": Rates(100.0, {EXACT: 0.01, "kvtc": 0.004, "turboquant-4bit": 0.002, "fp8-e4m3": 0.001}),
    "transformers": Rates(30.0, {EXACT: 0.005, "h2o": 0.001, "h2o+kvtc": 0.002}),
}
PROMPTS = {("essays", 640): 8, ("essay-chats", 1100): 10}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kvtc-16x@weighted", "kvtc"),
        ("kvtc2-8x shipped", "kvtc"),
        ("kivi-2bit/group=16", "kivi-2bit"),
        ("fp8-e4m3+kvtc-8x", "fp8-e4m3+kvtc"),
        ("snapkv/keep=0.5+kvtc2-16x@ordinary", "h2o+kvtc"),
        ("clusterkv/keep=0.25/tokens=10", "clusterkv"),
    ],
)
def test_a_setting_counts_as_its_method(name: str, kind: str) -> None:
    assert table_seconds.kind(name) == kind


def test_a_command_is_its_processes_and_the_tokens_of_its_prompts() -> None:
    tokens = 8 * 640 + 10 * 1100
    both = "--tasks essays:640,essay-chats:1100 --share-exact --count 8"
    seconds = table_seconds.of_command(
        f"kvtc eval M --methods kvtc-8x@w,xkv/keys=0.5 {both}", PROMPTS, RATES
    )
    # xKV needs whole prompts, so it has a process and exact runs of its own.
    mean = (0.004 + 0.002 + 0.001) / 3
    assert seconds == pytest.approx(200 + tokens * (0.01 + 0.004 + 0.01 + mean))
    seconds = table_seconds.of_command(
        f"kvtc eval M --methods h2o,tova+kvtc-8x {both}", PROMPTS, RATES
    )
    assert seconds == pytest.approx(30 + tokens * (0.005 + 0.001 + 0.002))


def test_what_was_not_probed_counts_as_its_kin_or_as_all() -> None:
    assert RATES["tier"].of("turboquant-3.5bit") == 0.002
    assert RATES["tier"].of("raw") == 0.001
    assert RATES["tier"].of("lorc") == pytest.approx((0.004 + 0.002 + 0.001) / 3)


def test_what_was_timed_counts_as_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_seconds, "RESULTS", tmp_path)
    first, second = (
        f"kvtc eval M --methods {name} --tasks essays:640 --count 2" for name in ("xkv", "h2o")
    )

    def row(method: str, metric: str, value: float, n: int) -> Row:
        return Row(
            task="essays",
            method=method,
            plan="",
            real_ratio=1.0,
            context=640,
            label="",
            metric=metric,
            value=value,
            ci95=(value, value),
            n=n,
        )

    def write(folder: str, about: dict[str, Any], rows: list[Row]) -> None:
        report.write_rows(tmp_path / folder, about, rows)

    for way, method in (("tier", "kvtc2-16x shipped"), ("transformers", "h2o")):
        rows = [row(EXACT, SECONDS, 6.4, 2), row(method, SECONDS, 12.8, 2)]
        about = {"command": first, "seconds": {first: {"wall": 99, "processor": 30}}}
        write(table_seconds.PROBES[way], about, rows)
    known = {"command": f"{first}; {second}", "seconds": {second: {"wall": 90, "processor": 60}}}
    write("some", known, [row(EXACT, "nll", 2.0, 8)])
    found = table_seconds.estimate(["some"])
    # Of two prompts 19.2 s and a start of 10.8, so of eight 76.8 and 10.8, with either method.
    assert found.total == pytest.approx(87.6 + 60)
    assert (found.measured, found.known, found.commands) == (60, 1, 2)
    assert found.ratios == pytest.approx([87.6 / 60])
    assert found.guessed == ["xkv"]
    assert "of xkv nothing is known" in found.told()
    # What another run says of xKV: 25.6 s for two prompts and 12.8 for one of another setting.
    more = [row("xkv", SECONDS, 25.6, 2), row("xkv/keys=0.5", SECONDS, 12.8, 1)]
    write(table_seconds.ALSO[0], {"command": second}, more)
    found = table_seconds.estimate(["some"])
    assert found.total == pytest.approx(10.8 + 8 * (3.2 + 12.8) + 60)
    assert found.guessed == []
    assert "nothing is known" not in found.told()
