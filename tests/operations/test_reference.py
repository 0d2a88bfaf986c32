"""The page that is made from the code is that of the code."""

from __future__ import annotations

from kvtc_vllm.cli import COMMANDS
from kvtc_vllm.offload.stats import BY_HALVINGS, BY_KIND, COUNTERS, GAUGES, LABELLED
from tools import reference


def test_the_committed_page_is_that_of_the_code() -> None:
    assert reference.PATH.read_text() == reference.text(), "run python -m tools.reference"


def test_it_has_every_metric_and_command() -> None:
    page = reference.text()
    for name in (*COUNTERS, *GAUGES, *LABELLED, *BY_KIND, *BY_HALVINGS):
        assert f"`vllm:kvtc_{name}" in page
    for name in COMMANDS:
        assert f"### kvtc {name}\n" in page
