"""Every command of the documents: `kvtc` parses it, or what it names is there."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtc_vllm.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "FORMAT.md", "configs/README.md")
PAGES = [*(ROOT / name for name in NAMES), *ROOT.glob("docs/*.md")]
MAKEFILE = (ROOT / "Makefile").read_text()


def check_kvtc(words: list[str]) -> None:
    if words[0].startswith("-"):
        return
    # `a|b` is a choice of the text, and "..." leaves something out.
    parser = argparse.ArgumentParser()
    COMMANDS[words[0]].add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= known


def check_make(words: list[str]) -> None:
    for word in words:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert re.search(rf"\$\((or \$\()?{name}\b|^{name} [?:]?=", MAKEFILE, re.MULTILINE)
        else:
            assert re.search(rf"^{re.escape(name)}:", MAKEFILE, re.MULTILINE)


def check_python(words: list[str]) -> None:
    assert words[0] == "-m"
    if words[1].split(".")[0] in ("benchmarks", "kvtc_vllm", "tests", "tools"):
        assert importlib.util.find_spec(words[1]) is not None


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:\.|kvtc-vllm)\[([^]]*)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def check_vllm(words: list[str]) -> None:
    if words[0] != "serve":
        return
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    package = Path(found.origin).parent
    of_server = package.glob("entrypoints/**/cli_args.py")
    source = "".join(path.read_text() for path in (package / "engine/arg_utils.py", *of_server))
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").split("=")[0].replace("-", "_")
            assert re.search(rf"^    {name}:", source, re.MULTILINE)


def check_files(words: list[str]) -> None:
    files = [words[number + 1] for number, word in enumerate(words) if word == "-f"]
    assert files
    assert all((ROOT / name).is_file() for name in files)


def check_nothing(words: list[str]) -> None:
    assert words


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "kvtc": check_kvtc,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "vllm": check_vllm,
    "kubectl": check_files,
    "helm": check_files,
    "docker": check_files,
    "git": check_nothing,
    "cd": check_nothing,
    "export": check_nothing,
}


def split(line: str) -> list[str]:
    return shlex.split(re.sub(r'"?\$\([^)]*\)"?', "INNER", line), comments=True)


def in_blocks(page: Path) -> Iterator[list[str]]:
    for block in re.findall(r"^```\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        if lines[0].split()[0].rstrip(":") in CHECKS and not lines[0].startswith("kvtc:"):
            yield from map(split, lines)
        for line in lines:
            yield from map(split, re.findall(r"\$\(([^)]*)\)", line))


def in_sentences(page: Path) -> Iterator[list[str]]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    programs = "|".join(CHECKS)
    for command in re.findall(rf"`((?:{programs}) [^`]+)`", text):
        yield split(command.replace("|", " ").replace("'", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_is_there(page: Path) -> None:
    for words in [*in_blocks(page), *in_sentences(page)]:
        program, *rest = words
        assert program in CHECKS, words
        try:
            CHECKS[program](rest)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{page.name}: {' '.join(words)}") from error


def test_commands_are_found() -> None:
    found = [words for page in PAGES for words in [*in_blocks(page), *in_sentences(page)]]
    assert len(found) > 80
    assert {"kvtc", "make", "python", "pip", "vllm", "kubectl", "helm"} <= {w[0] for w in found}


@pytest.mark.parametrize(
    "command",
    [
        "kvtc gc --nothing",
        "make nothing",
        "python -m tools.nothing",
        "pip install .[nothing]",
        "vllm serve M --nothing",
        "kubectl apply -f nothing.yaml",
        "make demo NOTHING=1",
    ],
)
def test_what_is_not_there_is_found(command: str) -> None:
    program, *rest = command.split()
    with pytest.raises(AssertionError):
        CHECKS[program](rest)
