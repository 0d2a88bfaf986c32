"""Unpacks archives and wheels into one folder and prints the line that makes them importable.

    eval "$(python -m benchmarks.gpu.bundle TARGET SOURCE [SOURCE ...])"

SOURCE is an archive (.tar.xz), a wheel, or a folder of either: vLLM and what it needs for a
machine without network, nvCOMP, isal. Nothing is installed: TARGET comes before the machine's own
packages on PYTHONPATH and this project before TARGET. What was unpacked once is left alone. Names
on stderr what is still missing of the modules that the benchmarks import.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("isal", "msgspec", "numpy", "safetensors", "torch", "tqdm", "triton", "xxhash", "yaml")
OPTIONAL = ("nvidia.libnvcomp", "pytest", "hypothesis", "vllm")


def main() -> int:
    """Exit status 1 if a module is missing that every benchmark needs."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.bundle", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", type=Path)
    parser.add_argument("source", type=Path, nargs="*")
    args = parser.parse_args()
    target = args.target.resolve()
    with ThreadPoolExecutor() as pool:
        for line in pool.map(lambda source: unpack(source, target), archives(args.source)):
            print(line, file=sys.stderr)
    sys.path[:0] = [str(target)]
    missing = [name for name in MODULES if not _is_there(name)]
    print("missing:", *missing, *(n for n in OPTIONAL if not _is_there(n)), file=sys.stderr)
    print(f"export PYTHONPATH={ROOT}:{target}${{PYTHONPATH:+:$PYTHONPATH}}")
    return int(bool(missing))


def archives(sources: list[Path]) -> Iterator[Path]:
    """Files to unpack. Raises FileNotFoundError for a source that is not there."""
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(source)
        if source.is_file():
            yield source
            continue
        for pattern in ("*.tar.xz", "*.whl"):
            yield from sorted(source.glob(pattern))


def unpack(archive: Path, target: Path) -> str:
    """Unpack one file unless that was done before; returns a line for the log."""
    done = target / f".unpacked-{archive.name}-{archive.stat().st_size}"
    if done.exists():
        return f"already there: {archive.name}"
    target.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(target, filter="data")
    done.touch()
    return f"unpacked: {archive.name}"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
