"""Loops over very many files let other threads have their turn soon."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtc_vllm.tiers.disk import DiskStore
from kvtc_vllm.tiers.disk.filesystem import Listed, OsFileSystem
from kvtc_vllm.tiers.disk.turns import TURN_SECONDS, short_turns


@pytest.fixture(autouse=True)
def _usual_interval() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(usual)


def test_turns_are_short_until_the_last_loop_ends() -> None:
    with short_turns():
        with short_turns():
            assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS, rel=0.1)
        assert sys.getswitchinterval() == pytest.approx(TURN_SECONDS, rel=0.1)
    assert sys.getswitchinterval() == pytest.approx(0.005, rel=0.1)


def test_a_shorter_interval_stays() -> None:
    sys.setswitchinterval(0.0001)
    with short_turns():
        assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.1)
    assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.1)


def test_a_scan_takes_short_turns(tmp_path: Path) -> None:
    seen: list[float] = []

    class Noted(OsFileSystem):
        def list(self, path: str) -> list[Listed]:
            seen.append(sys.getswitchinterval())
            return super().list(path)

    root = tmp_path / "tier"
    store = DiskStore(root, bytes(16), filesystem=Noted(str(root)), min_free=0)
    seen.clear()
    store.scan()
    store.close()
    assert seen
    assert max(seen) == pytest.approx(TURN_SECONDS, rel=0.1)
    assert sys.getswitchinterval() == pytest.approx(0.005, rel=0.1)
