"""Builds what is released, checks it, and tries it without the source tree.

python -m tools.release [--out dist] [--resolve] [--quick]

The wheel is made from the sdist, so what is not in the sdist is missed here. Both are installed in
new environments whose dependencies are those of this one, or, with --resolve, pip's. The quick demo
then serves a model with the wheel; of the source tree it has the benchmarks and the model alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRIAL = (
    ["--version"],
    ["config", "kvtc-16x"],
    ["artifacts"],
    ["plan", "--kv-bytes-per-token", "131072", "--ratio", "16"],
    ["doctor"],
)
"""Commands that must succeed; the last one encodes and decodes with the shipped artifact."""
DEMO = ("benchmarks", "tests/reference_model")
"""What the demo needs of the sdist."""


def main() -> None:
    """Exits with 1 and the output of what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--resolve", action="store_true", help="let pip install dependencies")
    parser.add_argument("--quick", action="store_true", help="try the wheel alone, no demo")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    sdist, wheel = sorted(out.iterdir(), key=lambda path: path.suffix)
    print(f"built {sdist.name} ({size(sdist)}) and {wheel.name} ({size(wheel)})")
    run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])
    print("twine finds nothing wrong")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.quick:
            python = install(sdist, folder / "of-sdist", resolve=args.resolve)
            run([str(python.with_name("kvtc")), "--version"], folder)
            print("the sdist installs")
        python = install(wheel, folder / "of-wheel", resolve=args.resolve)
        for words in TRIAL:
            run([str(python.with_name("kvtc")), *words], folder)
        print("the wheel works without the source tree")
        if not args.quick:
            print(run_demo(python, sdist, folder))


def install(package: Path, place: Path, *, resolve: bool) -> Path:
    """Install into a new environment at `place`; returns its Python."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if resolve:
        run([*pip, str(package)], place)
    else:
        site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        # A plain path: the editable install of this project in that folder is not followed.
        dependencies = Path(site.strip()) / "dependencies.pth"
        dependencies.write_text(sysconfig.get_path("purelib") + "\n")
        run([*pip, "--no-deps", "--no-build-isolation", str(package)], place)
    found = run([str(python), "-c", "import kvtc_vllm; print(kvtc_vllm.__file__)"], place).strip()
    if not Path(found).is_relative_to(place):
        raise SystemExit(f"kvtc_vllm was imported from {found}, not from {package.name}")
    return python


def run_demo(python: Path, sdist: Path, folder: Path) -> str:
    """Serve the small model with what is installed, as `make demo-quick` does. Returns a table."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tree = folder / sdist.name.removesuffix(".tar.gz")
    place = folder / "demo"
    for part in DEMO:
        shutil.copytree(tree / part, place / part)
    return run([str(python), "-m", "benchmarks.demo.quick"], place)


def run(command: list[str], folder: Path | None = None) -> str:
    """Output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def size(path: Path) -> str:
    """In MB."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
