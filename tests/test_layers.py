"""Which part of the package may import which: one table, held against every import there is.

Imports inside functions and under TYPE_CHECKING count, and so does a module that is named by a
string. docs/architecture.md shows the same table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NAME = "kvtc_vllm"
MOST_LINES = 400


class Part(NamedTuple):
    """A folder or module. ours, others: all that it imports; ours are parts above it in `PARTS`."""

    path: str
    does: str
    ours: str
    others: str


# From below to above.
PARTS = (
    Part(
        "codec",
        "tensors -> bytes -> tensors: RoPE, transform, quantisers, bit allocation, packing, "
        "entropy coders, container. Pure functions of (artifact, rows, positions)",
        "",
        "isal, llvmlite, numba, numpy, torch, xxhash",
    ),
    Part(
        "codec/kernels",
        "the same in batches on a GPU, from and to vLLM's pages: Triton kernels, nvCOMP",
        "codec",
        "numpy, nvidia, torch, triton",
    ),
    Part(
        "tiers",
        "what memory and disk hold: arena, indexes, eviction policies, byte budgets",
        "",
        "",
    ),
    Part(
        "tiers/disk",
        "the disk tier's store: publication, cap, recency, faults; see its docstring",
        "tiers",
        "msgspec, xxhash",
    ),
    Part(
        "artifact",
        "what serving reads of a calibration: artifact files, registry, which model it is",
        "codec",
        "huggingface_hub, msgspec, safetensors, torch, xxhash",
    ),
    Part(
        "config",
        "the keys of `kv_connector_extra_config`, presets",
        "",
        "msgspec, yaml",
    ),
    Part(
        "offload",
        "the offloading engine, without vLLM: scheduler and worker sides, lookups, store and load "
        "policies, pipelines, promotion, names, counters",
        "codec, tiers, tiers/disk, config",
        "msgspec, torch, xxhash",
    ),
    Part(
        "vllm_cache",
        "vLLM's paged cache as serving and calibration read it: releases, cache groups, element "
        "types, pages, RoPE tables",
        "codec, codec/kernels, offload",
        "torch, vllm",
    ),
    Part(
        "connector",
        "the seam to vLLM: connector, start-up, transfers, identity, metrics",
        "codec, codec/kernels, tiers, tiers/disk, artifact, config, offload, vllm_cache",
        "msgspec, torch, vllm, xxhash",
    ),
    Part(
        "calibration",
        "what only fitting needs: documents, capture, spool, sensitivity, PCA, fit, acceptance, "
        "writing, report",
        "codec, artifact, offload, vllm_cache",
        "datasets, matplotlib, msgspec, numpy, psutil, safetensors, torch, tqdm, transformers, "
        "vllm, xxhash",
    ),
    Part(
        "lmcache",
        "the codec below LMCache's server: serde, adapter, positions, settings",
        "codec, artifact, config, offload, vllm_cache",
        "lmcache, msgspec, prometheus_client, torch, xxhash, yaml",
    ),
    Part(
        "evaluation",
        "quality bench: tasks, two-pass replay, baselines, ablations, reports",
        "codec, artifact, config, offload, connector, calibration",
        "constriction, datasets, lm_eval, matplotlib, msgspec, numpy, safetensors, torch, "
        "tqdm, transformers, vllm, xxhash",
    ),
    Part(
        "load_test",
        "multi-turn load on running servers: conversations, traces, client, metrics, figures",
        "",
        "aiohttp, matplotlib, msgspec",
    ),
    Part(
        "planning",
        "hit rates, conversations that fit and bytes per second: Che's approximation, simulation",
        "artifact, load_test",
        "msgspec",
    ),
    Part(
        "cli",
        "`kvtc artifacts`, `bench`, `calibrate`, `config`, `doctor`, `eval`, `fit`, `gc`, "
        "`inspect`, `plan`, `publish`, `verify`",
        "codec, tiers, tiers/disk, artifact, config, vllm_cache, calibration, lmcache, evaluation, "
        "load_test, planning",
        "msgspec, torch, yaml",
    ),
)


def part_of(module: str) -> Part | None:
    """The innermost part that a module is in; None for the package's own `__init__`."""
    inside = [p for p in PARTS if f"{module}.".startswith(f"{NAME}.{p.path.replace('/', '.')}.")]
    return max(inside, key=lambda part: len(part.path), default=None)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    paths = [path.relative_to(ROOT) for path in sorted((ROOT / NAME).rglob("*.py"))]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(module: str) -> Iterator[str]:
    """Dotted names that a module imports: of ours, modules."""
    for node in ast.walk(ast.parse((ROOT / modules()[module]).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in modules() else str(node.module)


def named(module: str) -> Iterator[str]:
    """Our modules that a module names in a string, to be imported by somebody."""
    for node in ast.walk(ast.parse((ROOT / modules()[module]).read_text())):
        if isinstance(node, ast.Constant) and node.value in modules():
            yield node.value


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.path)
def test_a_part_imports_what_the_table_says(part: Part) -> None:
    ours: dict[str, str] = {}
    others: dict[str, str] = {}
    for module in modules():
        if part_of(module) is not part:
            continue
        for name in (*imports(module), *named(module)):
            top, target = name.partition(".")[0], part_of(name)
            if top != NAME and top not in sys.stdlib_module_names:
                others.setdefault(top, module)
            elif target is not None and target is not part:
                ours.setdefault(target.path, module)
    # The modules show in the message: each is one that imports what the table lacks.
    assert {n: m for n, m in ours.items() if n not in words(part.ours)} == {}
    assert {n: m for n, m in others.items() if n not in words(part.others)} == {}
    assert words(part.ours) <= set(ours), "the table allows what nobody imports"
    assert words(part.others) <= set(others), "the table allows what nobody imports"


def test_a_part_only_imports_parts_below_it() -> None:
    for index, part in enumerate(PARTS):
        assert words(part.ours) <= {below.path for below in PARTS[:index]}, part.path


def test_every_module_is_in_a_part() -> None:
    assert [module for module in modules() if part_of(module) is None] == [NAME]


def test_no_loops() -> None:
    """Neither of modules nor of the folders that they are in: siblings import in one direction."""
    graph: dict[str, set[str]] = {}
    for module in modules():
        for name in imports(module):
            if name in modules():
                source, target = siblings(module, name)
                graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def siblings(source: str, target: str) -> tuple[str, str]:
    """Modules or folders, next to each other, that the two are or are in."""
    a, b = source.split("."), target.split(".")
    same = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return ".".join(a[: same + 1]), ".".join(b[: same + 1])


def test_no_file_is_longer_than_one_can_read() -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in modules().values()}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_the_architecture_page_shows_this_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = [line for line in page.splitlines() if line.startswith(f"| `{NAME}/")]
    assert table == [
        f"| `{NAME}/{part.path}` | {part.does} | {part.ours or '-'} | {part.others or '-'} |"
        for part in PARTS
    ]


def words(text: str) -> set[str]:
    """Of a list with commas."""
    return {word.strip() for word in text.split(",") if word.strip()}
