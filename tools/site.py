"""Builds the documents into a site, `build/site`, with MkDocs; a broken link is an error.

python -m tools.site

Pages keep their places in the repository, so that links are right in both. What a page links to is
taken along.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "pages"
_LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)(?:#[^)]*)?\)")


def main() -> None:
    """Exits with what MkDocs says if it finds anything wrong."""
    if importlib.util.find_spec("mkdocs") is None:
        raise SystemExit("tools.site needs MkDocs: pip install 'kvtc-vllm[docs]'")
    shutil.rmtree(PAGES, ignore_errors=True)
    for path in sorted(linked(roots())):
        target = PAGES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    raise SystemExit(subprocess.run(command, cwd=ROOT).returncode)


def roots() -> list[Path]:
    """The pages that a reader begins with."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def linked(pages: list[Path]) -> set[Path]:
    """These pages and all files that they lead to. Raises SystemExit that names a broken link."""
    found: set[Path] = set()
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        if page in found:
            continue
        found.add(page)
        if page.suffix != ".md":
            continue
        for target in _LINK.findall(page.read_text()):
            path = (page.parent / target).resolve()
            if not path.is_file() or not path.is_relative_to(ROOT):
                raise SystemExit(f"{page.relative_to(ROOT)}: {target} is no file of this project")
            waiting.append(path)
    return found


if __name__ == "__main__":
    main()
