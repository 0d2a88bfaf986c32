"""Writes `docs/errors.md`: every sentence with which a start can be refused, from the code.

python -m tools.errors

Found are the raises of `ERRORS` in `PLACES`. A message says the cause and then, behind its last
semicolon, the way out; where it does not, the place's `way_out` is the way. A part that is known
only when it happens stands in <brackets>.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "errors.md"
ERRORS = {"ConfigError", "UnsupportedError", "ArtifactError", "PermissionError"}
WAYS = (
    "allowed:",
    "below,",
    "calibrate",
    "give",
    "remove",
    "run",
    "serve",
    "set",
    "start",
    "this release works",
    "use",
)
"""How a way out begins; what begins otherwise belongs to the cause."""


@dataclass(frozen=True)
class Place:
    """Modules whose refusals have one kind of cause."""

    title: str
    says: str
    way_out: str
    modules: tuple[str, ...]


PLACES = (
    Place(
        "The configuration",
        "Raised as `ConfigError`, before anything is loaded. Keys are those of "
        "`kv_connector_extra_config`.",
        "`kvtc config --describe` prints every key with its values",
        ("config/*.py", "offload/geometry.py"),
    ),
    Place(
        "vLLM, the model and its cache",
        "Raised as `UnsupportedError`: what is asked for is not read, and nothing is guessed.",
        "serve without this package, and report the model and the release of vLLM",
        (
            "vllm_cache/*.py",
            "connector/scales.py",
            "connector/stages.py",
            "connector/state_transfer.py",
        ),
    ),
    Place(
        "The artifact in the engine",
        "The artifact was found and read, and is not that of this engine; or the disk tier cannot "
        "tell its chunks from others'.",
        "calibrate again with the settings that serve: `kvtc calibrate MODEL --data TEXT`",
        (
            "connector/memory_tier.py",
            "connector/one_copy.py",
            "connector/startup.py",
            "connector/halver.py",
            "codec/cpu/requantise.py",
            "connector/rank_artifacts.py",
            "connector/selftest.py",
            "connector/artifact_lookup.py",
        ),
    ),
    Place(
        "The disk tier's directory",
        "Behind `disk_path=... can't be used:`. Anything else there is what the operating system "
        "says.",
        "see [the disk tier](disk.md#protecting-the-directory)",
        ("tiers/disk/filesystem.py",),
    ),
    Place(
        "Artifacts and registries",
        "Raised as `ArtifactError`. `kvtc artifacts --model MODEL` lists what is found where and "
        "why it does not fit.",
        "copy or download the artifact again, or calibrate again",
        ("artifact/*.py",),
    ),
    Place(
        "The codec",
        "The artifact's contents contradict one another, or the cache.",
        "copy or download the artifact again, or calibrate again",
        ("codec/*.py", "codec/v2/*.py", "codec/kernels/*.py"),
    ),
    Place(
        "Below LMCache",
        "When LMCache's server loads the module, or `kvtc config lmcache` is called.",
        "`kvtc config lmcache --describe` prints every setting",
        ("lmcache/*.py",),
    ),
)
NOT_AT_A_START = {("artifact/hub.py", "publish")}


@dataclass(frozen=True)
class Refusal:
    """One message. module: below `kvtc_vllm`. way_out: empty if the message has none."""

    module: str
    message: str
    cause: str
    way_out: str


def refusals(place: Place) -> list[Refusal]:
    """Of the place's modules, in their order, each message once."""
    found: dict[str, Refusal] = {}
    package = ROOT / "kvtc_vllm"
    for pattern in place.modules:
        for path in sorted(package.glob(pattern)):
            module = str(path.relative_to(package))
            for message in _messages(ast.parse(path.read_text()), module):
                cause, _, way_out = message.rpartition("; ")
                if not (cause and way_out.startswith(WAYS)):
                    cause, way_out = message, ""
                found.setdefault(message, Refusal(module, message, cause, way_out))
    return list(found.values())


def _messages(tree: ast.Module, module: str) -> Iterator[str]:
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for name, function in functions.items():
        if (module, name) in NOT_AT_A_START:
            continue
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and isinstance(node.exc.func, ast.Name)
                and node.exc.func.id in ERRORS
            ):
                yield from _texts(node.exc.args[-1], functions)


def _texts(message: ast.expr, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    if isinstance(message, ast.Call) and isinstance(message.func, ast.Name):
        # Put together by a function: its first text is what comes first.
        for node in ast.walk(functions[message.func.id]):
            if isinstance(node, ast.JoinedStr):
                yield _text(node)
                return
    yield _text(message)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"<{_name(node.value)}>"
    raise SystemExit(f"line {node.lineno}: a message that cannot be read from the code")


def _name(value: ast.expr) -> str:
    """A word for a value: its variable, attribute or function."""
    if isinstance(value, ast.Name):
        return value.id.strip("_").lower()
    if isinstance(value, ast.Attribute):
        return value.attr.strip("_")
    if isinstance(value, ast.Call):
        inner = value.args[0] if value.args else value.func
        return _name(inner)
    if isinstance(value, ast.Subscript):
        return _name(value.value)
    if isinstance(value, ast.BoolOp):
        return _name(value.values[0])
    if isinstance(value, ast.IfExp):
        return " or ".join(_name(part) for part in (value.body, value.orelse))
    if isinstance(value, ast.Constant):
        return str(value.value)
    return "..."


def text() -> str:
    """The page."""
    parts = [
        "# Start-up errors",
        "Made from the code by `python -m tools.errors`; a test compares. Every sentence with "
        "which a start can be refused, by where its cause is. What is known only when it happens "
        "stands in <brackets>. While an engine runs, nothing of this is raised: bad data are "
        "misses, see [operations.md](operations.md).",
    ]
    for place in PLACES:
        rows = [
            f"| {_cell(found.cause)} | {_cell(found.way_out) if found.way_out else ''} |"
            for found in refusals(place)
        ]
        parts += [
            f"## {place.title}",
            place.says,
            f"Where the second column is empty: {place.way_out}.",
            "\n".join(["| message | way out |", "|---|---|", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def _cell(words: str) -> str:
    escaped = words.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.replace("*", "\\*").split())


if __name__ == "__main__":
    PATH.write_text(text())
