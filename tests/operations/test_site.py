"""The site: every page of the documents is in its menu, every link leads to a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import site


def pages(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages(value)


def test_the_menu_has_every_page_once() -> None:
    menu = list(pages(yaml.safe_load((site.ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(menu) == len(set(menu))
    assert set(menu) == {str(path.relative_to(site.ROOT)) for path in site.roots()}


def test_the_site_is_built_of_the_copied_pages() -> None:
    settings = yaml.safe_load((site.ROOT / "mkdocs.yml").read_text())
    assert settings["site_name"] == "kvtc-vllm"
    assert site.ROOT / settings["docs_dir"] == site.PAGES
    # Links end in .html then, as the pages lie; an anchor that is not there is a warning.
    assert settings["use_directory_urls"] is False
    assert settings["validation"]["links"]["anchors"] == "warn"


def test_what_is_linked_is_taken_along() -> None:
    found = site.linked(site.roots())
    assert site.ROOT / "docker" / "compose.yaml" in found
    assert site.ROOT / "benchmarks" / "results" / "demo.png" in found


def test_a_broken_link_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("see [b](b.md#x) and [c](https://c)")
    with pytest.raises(SystemExit, match=r"a\.md: b\.md is no file"):
        site.linked([page])
    (tmp_path / "b.md").write_text("back to [a](a.md)")
    assert site.linked([page]) == {page, tmp_path / "b.md"}
