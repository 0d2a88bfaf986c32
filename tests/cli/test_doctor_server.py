"""`kvtc doctor URL`: a page of metrics, and what a person is told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.offload.stats import COUNTERS, GAUGES, LABELLED
from kvtc_vllm.tiers.disk import DISK_REASONS
from tests.http_server import answering, serving

WELL = {
    "stored_raw_bytes": 16e6,
    "stored_bytes": 1e6,
    "stored_chunks": 90,
    "loaded_chunks": 40,
    "lookup_tokens": 1000,
    "hit_tokens": 600,
    "tier_used_bytes": 1e6,
    "tier_capacity_bytes": 2**24,
    "tier_chunks": 60,
}
PAGES: dict[str, str] = {}


def page(**changes: float) -> str:
    """As the connector publishes: every metric, also those that are 0."""
    values = WELL | changes
    lines = ["# HELP vllm:x y", 'vllm:prompt_tokens_total{engine="0"} 5.0']
    published = {**{f"{name}_total": name for name in COUNTERS}, **{name: name for name in GAUGES}}
    lines += [
        f'vllm:kvtc_{metric}{{engine="0"}} {values.get(name, 0)}'
        for metric, name in published.items()
    ]
    for name, (_, reasons) in LABELLED.items():
        for reason in reasons:
            value = values.get(f"{name}_{reason}", 0)
            lines.append(f'vllm:kvtc_{name}_total{{engine="0",reason="{reason}"}} {value}')
    return "\n".join(lines) + "\n"


@pytest.fixture
def server() -> Iterator[str]:
    with serving(answering(lambda path: PAGES[path].encode())) as url:
        yield url
    PAGES.clear()


def test_a_server_that_is_well(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    PAGES["/metrics"] = page()
    for address in (server, f"{server}/v1", f"{server}/metrics"):
        assert main(["doctor", address, "--ratio", "16"]) == 0
    printed = capsys.readouterr().out
    assert "ok   ratio       16.00 bytes of KV per byte stored, the target is 16" in printed
    assert "60.0% of the 1,000 tokens that were looked up" in printed
    assert "1 of 16 MiB, 60 chunks" in printed
    assert "no disk tier" in printed
    assert printed.splitlines()[-1] == "the connector is well"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stored_bytes": 4e6}, "BAD  ratio       4.00"),
        ({"dropped_stores_staging_full": 30}, "25.0% given up (staging_full 30)"),
        ({"failed_loads_checksum": 2, "failed_loads_missing": 3}, "missing 3, checksum 2"),
        ({f"disk_errors_{DISK_REASONS[0]}": 1}, "BAD  disk"),
        ({"disk_capacity_bytes": 1e6, "expired_waits": 4}, "4 requests stopped waiting"),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, float], words: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PAGES["/metrics"] = page(**changes)
    assert main(["doctor", server, "--ratio", "16"]) == 1
    printed = capsys.readouterr().out
    assert words in printed
    assert printed.splitlines()[-1] == "something is wrong, see above"


def test_missing_chunks_and_gated_tokens_are_no_fault(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PAGES["/metrics"] = page(failed_loads_missing=3, gated_tokens=70, weight_changes=1)
    assert main(["doctor", server, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    says = {line["check"]: line["says"] for line in found["checks"]}
    assert found["healthy"] is True
    assert "70 more were found but computed" in says["hits"]
    assert "exchanged 1 times" in says["weights"]


def test_a_server_without_the_connector(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    PAGES["/metrics"] = "vllm:prompt_tokens_total 5\n"
    assert main(["doctor", server]) == 1
    assert "without --kv-transfer-config" in capsys.readouterr().out


def test_a_server_before_its_first_request(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    PAGES["/metrics"] = page(**dict.fromkeys(WELL, 0.0))
    assert main(["doctor", server]) == 0
    printed = capsys.readouterr().out
    assert "nothing is stored yet" in printed
    assert "ask it something first" in printed


def test_no_server_and_another_page_are_one_line(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    PAGES["/metrics"] = "<html>hello</html>"
    for address, words in ((server, "holds no metric"), ("http://127.0.0.1:9", "cannot be read")):
        assert main(["doctor", address]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
