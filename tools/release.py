"""Builds what is released, checks it, and tries the wheel without the source tree.

python -m tools.release [--out dist] [--resolve]

The wheel is made from the sdist, so what is not in the sdist is missed here. It is installed in a
new environment whose dependencies are those of this one, or, with --resolve, pip's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
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


def main() -> None:
    """Exits with 1 and the output of what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--resolve", action="store_true", help="let pip install dependencies")
    args = parser.parse_args()
    out: Path = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    sdist, wheel = sorted(out.iterdir(), key=lambda path: path.suffix)
    print(f"built {sdist.name} ({size(sdist)}) and {wheel.name} ({size(wheel)})")
    if importlib.util.find_spec("twine"):
        run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])
        print("twine finds nothing wrong")
    else:
        print("twine is not installed: metadata not checked")
    with tempfile.TemporaryDirectory() as folder:
        try_wheel(wheel, Path(folder), resolve=args.resolve)
    print("the wheel works without the source tree")


def try_wheel(wheel: Path, folder: Path, *, resolve: bool) -> None:
    """Install into a new environment, and run commands from an empty directory."""
    place = folder / "venv"
    venv.create(place, with_pip=True)
    python = str(place / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*install, str(wheel)] if resolve else [*install, "--no-deps", str(wheel)], folder)
    site = Path(
        run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    )
    if not resolve:
        # A plain path: the editable install of this project in that folder is not followed.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = run([python, "-c", "import kvtc_vllm; print(kvtc_vllm.__file__)"], folder).strip()
    if not Path(found).is_relative_to(place):
        raise SystemExit(f"kvtc_vllm was imported from {found}, not from the wheel")
    for words in TRIAL:
        run([str(place / "bin" / "kvtc"), *words], folder)


def run(command: list[str], folder: Path | None = None) -> str:
    """Output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def size(path: Path) -> str:
    """In MB."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
