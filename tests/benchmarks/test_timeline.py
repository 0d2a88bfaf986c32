"""How the roofline puts host times and device times together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.gpu.timeline import NO_HOST, HostTimes, load_seconds, store_seconds

ROOT = Path(__file__).parents[2]
LOAD = {"upload": 2.0, "inflate": 6.0, "unpack": 1.0, "decode product": 4.0, "scatter": 1.0}
STORE = {
    "gather": 1.0,
    "encode product": 4.0,
    "range": 0.5,
    "pack": 0.5,
    "deflate": 2.0,
    "collect": 0.25,
    "download": 0.75,
}
NO_DEVICE = dict.fromkeys((*LOAD, *STORE), 0.0)
ROW = {
    "load_first_upload_thread_ms": 2000.0,
    "load_first_upload_cpu_ms": 10000.0,
    "load_first_inflate_thread_ms": 3000.0,
    "load_thread_ms": 8000.0,
    "load_cpu_ms": 24000.0,
    "store_thread_ms": 9000.0,
    "store_cpu_ms": 17000.0,
    "store_after_device_ms": 5000.0,
}


def test_a_load_in_one_wave_is_the_sum_of_its_stages() -> None:
    assert load_seconds(LOAD, NO_HOST, 1) == 14


@pytest.mark.parametrize(("inflate", "expected"), [(6.0, 10.0), (10.0, 14.0), (2.0, 8.0)])
def test_a_wave_is_inflated_while_the_one_before_is_decoded(
    inflate: float, expected: float
) -> None:
    """Of two waves: half of all stages, and the longer of inflating and decoding once more."""
    assert load_seconds({**LOAD, "inflate": inflate}, NO_HOST, 2) == expected


def test_times_of_a_row() -> None:
    times = HostTimes.of(ROW, threads=4)
    assert times == HostTimes(2.0, 2.0, 3.0, 8.0, 4.0, 9.0, 2.0, 5.0)
    # Each clock has its own best round, so all threads may seem to have less than one of them.
    assert HostTimes.of(ROW | {"store_cpu_ms": 8500.0}).store_others == 0


def test_what_passes_before_the_first_upload_counts_once() -> None:
    """The thread that launches has done it by then."""
    host = HostTimes.of(ROW, threads=4)
    assert load_seconds(NO_DEVICE, host, 2) == 2 + (8 - 2) + 2


def test_other_threads_work_beside_the_one_that_launches() -> None:
    """On cores of their own: only what comes before the first upload is waited for."""
    alone = HostTimes(first_upload_own=2, load_own=8)
    assert load_seconds(NO_DEVICE, alone, 2) == 8
    helped = HostTimes(first_upload_own=2, load_own=8, first_upload_others=1, load_others=7)
    assert load_seconds(NO_DEVICE, helped, 2) == 9
    slow = HostTimes(first_upload_own=2, load_own=8, load_others=20)
    assert load_seconds(NO_DEVICE, slow, 2) == 20


def test_launches_of_a_load_run_beside_the_device() -> None:
    host = HostTimes(first_upload_own=1, first_inflate_own=1, load_own=5)
    assert load_seconds(LOAD, host, 2) == 1 + load_seconds(LOAD, NO_HOST, 2)
    slow = HostTimes(first_upload_own=1, first_inflate_own=1, load_own=101)
    # Nothing but the last wave's launches is left at the end.
    assert load_seconds(LOAD, slow, 2) == 101


def test_the_device_waits_for_the_first_inflating_to_be_launched() -> None:
    host = HostTimes(first_inflate_own=3, load_own=6)
    # The first wave's upload takes 1 s meanwhile.
    assert load_seconds(LOAD, host, 2) == 3 - 1 + load_seconds(LOAD, NO_HOST, 2)


def test_a_store_launches_beside_the_device_and_writes_after_it() -> None:
    assert store_seconds(STORE, NO_HOST) == sum(STORE.values())
    host = HostTimes(store_own=9, after=5)
    assert store_seconds(STORE, host) == sum(STORE.values()) + 5
    assert store_seconds(NO_DEVICE, host) == 9
    # Sizes of units are not known before all is launched; the copy to the host comes after that.
    slow = HostTimes(store_own=25, after=5, store_others=2)
    assert store_seconds(STORE, slow) == 20 + 5 + 1 + 2


ROWS = ROOT / "benchmarks" / "results" / "gpu" / "roofline.json"
WAVES = 2
"""Of a load of 8,192 tokens."""


def test_the_committed_predictions_follow_from_their_stages_and_host_times() -> None:
    rows = json.loads(ROWS.read_text())
    assert {row["codec"] for row in rows} == {"kvtc", "kvtc2"}
    for row in rows:
        stages = {name: ms / 1e3 for name, ms in row["stage_ms"].items()}
        host = HostTimes.of(row["host"])
        for name, seconds in (
            ("decode_device", load_seconds(stages, NO_HOST, WAVES)),
            ("decode", load_seconds(stages, host, WAVES)),
            ("encode_device", store_seconds(stages, NO_HOST)),
            ("encode", store_seconds(stages, host)),
        ):
            assert row[f"{name}_ms"] == pytest.approx(1e3 * seconds, rel=1e-3)
            assert row[f"{name}_gbps"] == pytest.approx(row["raw_bytes"] / seconds / 1e9, abs=0.1)


def test_the_page_has_the_committed_predictions() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    told = {
        (plan, int(layers)): (int(a), int(b), int(c), int(d))
        for plan, layers, a, b, c, d in re.findall(
            r"^\| (kvtc2? \d+x)[^|]*\| (\d) \| (\d+) \| (\d+) \| [^|]+ \| (\d+) \| (\d+) \|",
            page,
            re.MULTILINE,
        )
    }
    names = ("decode_device", "decode", "encode_device", "encode")
    assert told == {
        (f"{row['codec']} {row['plan']:g}x", row["layers_per_group"]): tuple(
            round(row[f"{name}_gbps"]) for name in names
        )
        for row in json.loads(ROWS.read_text())
        if row["gpu"] == "H100"
    }
