"""Writes `docs/reference.md`: keys, metrics, reasons and commands, as the code has them.

python -m tools.reference
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvtc_vllm.cli import COMMANDS
from kvtc_vllm.config import ConfigKey, describe
from kvtc_vllm.config.keys import describe_keys
from kvtc_vllm.lmcache.settings import LMCacheSettings
from kvtc_vllm.offload.stats import (
    BY_HALVINGS,
    BY_KIND,
    CACHE_KINDS,
    COUNTERS,
    GAUGES,
    HALVINGS,
    LABELLED,
)

PATH = Path(__file__).resolve().parents[1] / "docs" / "reference.md"


def text() -> str:
    """The page."""
    parts = [
        "# Reference",
        "Made from the code by `python -m tools.reference`; a test compares. What is behind a key "
        "is explained in [configuration.md](configuration.md), what a figure means in "
        "[operations.md](operations.md).",
        "## Keys of kv_connector_extra_config",
        _keys(describe()),
        "## Keys below LMCache",
        _keys(describe_keys(LMCacheSettings)),
        "## Metrics",
        "On the server's `/metrics`, with the labels `model_name` and `engine`. Counters only grow "
        "while the server runs.",
        _metrics(),
        "## Reasons",
        _reasons(),
        "## Commands",
        *_commands(),
    ]
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(word) for word in line) + " |" for line in lines)


def _cell(word: str) -> str:
    return word.replace("|", "\\|")


def _keys(keys: Sequence[ConfigKey]) -> str:
    rows = ([f"`{key.name}`", key.default, key.values, key.meaning] for key in keys)
    return _table(["key", "default", "values", "meaning"], rows)


def _metrics() -> str:
    rows = [(f"`vllm:kvtc_{name}_total`", "counter", says) for name, says in COUNTERS.items()]
    rows += [
        (f"`vllm:kvtc_{name}_total`", "counter, label `reason`", says)
        for name, (says, _) in LABELLED.items()
    ]
    for label, texts, values in (
        ("kind", BY_KIND, CACHE_KINDS),
        ("times", BY_HALVINGS, HALVINGS),
    ):
        allowed = ", ".join(f"`{value}`" for value in values)
        rows += [
            (f"`vllm:kvtc_{name}_total`", f"counter, label `{label}`: {allowed}", says)
            for name, says in texts.items()
        ]
    rows += [(f"`vllm:kvtc_{name}`", "gauge", says) for name, says in GAUGES.items()]
    return _table(["metric", "type", "meaning"], iter(rows))


def _reasons() -> str:
    rows = (
        (f"`vllm:kvtc_{name}_total`", ", ".join(f"`{reason}`" for reason in reasons))
        for name, (_, reasons) in LABELLED.items()
    )
    return _table(["metric", "values of `reason`"], rows)


def _commands() -> Iterator[str]:
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser(add_help=False)
        module.add_arguments(parser)
        first = (module.__doc__ or "").splitlines()[0]
        yield f"### kvtc {name}"
        yield first
        yield _table(["argument", "default", "meaning"], map(_argument, parser._actions))


def _argument(action: argparse.Action) -> tuple[str, str, str]:
    name = ", ".join(action.option_strings) or action.dest.upper()
    default = action.default
    # Not `in`: 0 is a default to show, and equals False.
    hidden = default is None or default is False or default == []
    return f"`{name}`", "" if hidden else f"`{default}`", action.help or ""


if __name__ == "__main__":
    PATH.write_text(text())
