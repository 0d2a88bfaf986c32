"""Dashboard and alerts: every metric they ask for exists, every alert fires when it must."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kvtc_vllm.offload.stats import COUNTERS, GAUGES, LABELLED
from tools import dashboard

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALERTS = CONFIGS / "prometheus" / "alerts.yaml"
SUFFIXES = ("_total", "_bucket")


def rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def queries() -> Iterator[str]:
    for panel in json.loads(dashboard.PATH.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (rule["expr"] for rule in rules())


def metrics(query: str) -> set[str]:
    return set(re.findall(r"vllm:\w+", query))


def published() -> set[str]:
    """Ours as connector/metrics.py names them, and vLLM's by the source of its own."""
    names = {f"vllm:kvtc_{name}_total" for name in (*COUNTERS, *LABELLED)}
    names |= {f"vllm:kvtc_{name}" for name in GAUGES}
    found = importlib.util.find_spec("vllm.v1.metrics.loggers")
    assert found is not None
    assert found.origin is not None
    for name in re.findall(r'name="(vllm:\w+)"', Path(found.origin).read_text()):
        names |= {name, *(name + suffix for suffix in SUFFIXES)}
    return names


def test_every_metric_of_a_query_exists() -> None:
    known = published()
    asked = set().union(*map(metrics, queries()))
    assert len(asked) > 25
    assert asked - known == set()


def test_what_fails_and_what_is_full_is_on_the_dashboard() -> None:
    shown = set().union(*(metrics(expr) for panel in dashboard.PANELS for expr, _ in panel.queries))
    assert {f"vllm:kvtc_{name}_total" for name in LABELLED} <= shown
    assert {f"vllm:kvtc_{name}" for name in GAUGES if name.endswith("_bytes")} <= shown


def test_reasons_that_are_asked_for_exist() -> None:
    known = {reason for _, reasons in LABELLED.values() for reason in reasons}
    asked = {r for q in queries() for r in re.findall(r'reason!?="(\w+)"', q)}
    assert asked
    assert asked <= known


def test_recorded_names_are_those_that_alerts_compare() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    compared = {n for r in rules() if "alert" in r for n in re.findall(r"kvtc:\w+", r["expr"])}
    assert compared == recorded


def test_the_committed_dashboard_is_that_of_the_code() -> None:
    assert dashboard.PATH.read_text() == dashboard.text()


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard.dashboard()["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(dashboard.PANELS)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def test_compose_mounts_what_exists() -> None:
    compose = CONFIGS.parent / "docker" / "compose.yaml"
    services = yaml.safe_load(compose.read_text())["services"]
    mounted = [v for s in services.values() for v in s.get("volumes", ()) if v.startswith("..")]
    assert len(mounted) == 3
    for volume in mounted:
        assert (compose.parent / volume.split(":")[0]).exists()
    scrape = yaml.safe_load((CONFIGS / "prometheus" / "prometheus.yaml").read_text())
    (target,) = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_the_rules_right_and_alerts_fire_when_they_must() -> None:
    for words in (["check", "rules", str(ALERTS)], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            ["promtool", *words], cwd=ALERTS.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
