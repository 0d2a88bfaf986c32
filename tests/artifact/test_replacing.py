"""A file that is replaced is the old one or the new one, and never half of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.artifact.replacing import replacing


def test_the_old_file_stays_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_the_old_file_stays_if_writing_fails(
    tmp_path: Path, error: type[BaseException], begun: bool
) -> None:
    path = tmp_path / "found.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as unfinished:
            if begun:
                unfinished.write_text("ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    with replacing(path) as unfinished:
        (tmp_path / unfinished.name).write_text("left by somebody, and longer")
        unfinished.write_text("new")
    assert path.read_text() == "new"
