"""The order of files: engines first, small files last, so that processes end together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.file_order import longest_first


def item(file: str, name: str, *marks: str) -> Any:
    return SimpleNamespace(
        path=Path(file), name=name, get_closest_marker=lambda mark: mark in marks or None
    )


def test_a_file_with_engines_comes_before_one_of_many_small_tests() -> None:
    many = [item("many.py", str(number)) for number in range(20)]
    slow = [item("slow.py", "a", "slow"), item("slow.py", "b")]
    engines = [item("engines.py", "a"), item("engines.py", "b", "vllm")]
    both = [item("both.py", "a", "slow", "vllm"), item("both.py", "b", "vllm")]
    long = [item("long.py", "a", "vllm", "long")]
    items = [*many, *slow, *engines, *both, *long]
    longest_first(items)
    assert items == [*long, *both, *engines, *slow, *many]


def test_files_that_take_the_same_stay_as_they_are() -> None:
    items = [item(file, name) for file in ("b.py", "a.py") for name in ("y", "x")]
    before = list(items)
    longest_first(items)
    assert items == before
