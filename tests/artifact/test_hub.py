"""Artifacts to a hub and from it, by commands in processes that read the endpoint as they start."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvtc_vllm.artifact.hub import hub_registry, parse_name
from kvtc_vllm.artifact.registry import ENVIRONMENT_VARIABLE, _environment
from kvtc_vllm.codec.errors import ArtifactError
from tests.artifact.commands import Run, commands
from tests.artifact.fake_hub import FakeHub

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = next((ROOT / "calibrations" / "kvtc-reference").glob("tp1-*"))
PLACE = f"{SHIPPED.parent.name}/{SHIPPED.name}"
RANK = f"{PLACE}/rank0of1.safetensors"
REPOSITORY = "org/kvtc-toy"

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with commands(tmp_path_factory.mktemp("commands")) as run:
        yield run


@dataclass(frozen=True)
class Machine:
    """Where commands run. environment: theirs."""

    run: Run
    environment: dict[str, str]

    def kvtc(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(self.environment, words)

    def refusal(self, *words: str) -> str:
        """The one line that a command ends with."""
        done = self.kvtc(*words)
        assert done.returncode == 2, done.stdout
        # Beside what huggingface_hub warns of by itself.
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("kvtc "))
        assert "Traceback" not in done.stderr
        return line

    def but(self, **changes: str) -> Machine:
        """With another environment."""
        return Machine(self.run, {**self.environment, **changes})


@pytest.fixture
def machine(hub: FakeHub, run: Run, tmp_path: Path) -> Iterator[Machine]:
    with hub.serving() as endpoint:
        own = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "token",
            "XDG_DATA_HOME": str(tmp_path / "data"),
        }
        yield Machine(run, {**os.environ, **own})


def files() -> dict[str, bytes]:
    """The shipped artifact as it lies in a repository."""
    return {
        f"{PLACE}/{path.name}": path.read_bytes() for path in SHIPPED.iterdir() if path.is_file()
    }


def test_what_is_published_is_found_and_used_offline(
    hub: FakeHub, machine: Machine, reference_model: Path
) -> None:
    done = machine.kvtc("publish", str(SHIPPED), f"hf:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    (commit,) = hub.commits[REPOSITORY]
    assert name == f"hf:{REPOSITORY}@{commit}"
    card = hub.commits[REPOSITORY][commit]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: kvtc-vllm\n")
    (command,) = re.findall(r"\$\((kvtc config [^)]*)\)", card)
    done = machine.kvtc(*shlex.split(command.replace("COMMIT", commit))[1:])
    assert json.loads(done.stdout)["kv_connector_extra_config"]["registry"] == [name]
    assert f"]({PLACE}/report.png)" in card
    assert hub.commits[REPOSITORY][commit][RANK] == (SHIPPED / "rank0of1.safetensors").read_bytes()

    listed = ["artifacts", "--registry", name, "--model", str(reference_model), "--json"]
    done = machine.kvtc(*listed)
    assert done.returncode == 0, done.stderr
    place = json.loads(done.stdout)[0]
    assert commit in place["registry"]
    (found,) = place["artifacts"]
    assert (found["artifact"], found["fits"]) == (PLACE, True)
    # Safetensors and cards, and nothing else of what lies there.
    assert sorted(hub.gets) == sorted([f"{PLACE}/card.json", RANK])
    # What it finds is whole: every rank file is checked.
    done = machine.kvtc("inspect", str(Path(place["registry"]) / PLACE))
    assert done.returncode == 0, done.stderr

    offline = machine.but(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    done = offline.kvtc(*listed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == place


def test_a_name_without_a_commit_is_told_the_newest(hub: FakeHub, machine: Machine) -> None:
    commit = hub.commit(REPOSITORY, files())
    for wrong in ("", "@main", f"@{commit[:8]}"):
        said = machine.refusal("artifacts", "--registry", f"hf:{REPOSITORY}{wrong}")
        assert "the full hash of a commit must follow" in said
    said = machine.refusal("artifacts", "--registry", f"hf:{REPOSITORY}")
    assert f"it is now at hf:{REPOSITORY}@{commit}" in said


def test_foreign_and_missing_repositories_are_one_line(hub: FakeHub, machine: Machine) -> None:
    foreign = hub.commit("org/model", {"model.safetensors": b"x", "config.json": b"{}"})
    named = f"hf:org/model@{foreign}"
    assert "holds no KVTC artifact" in machine.refusal("artifacts", "--registry", named)
    assert hub.gets == []
    gone = f"hf:org/gone@{'0' * 40}"
    assert f"{gone}: cannot be downloaded" in machine.refusal("artifacts", "--registry", gone)
    away = machine.but(HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be downloaded" in away.refusal("artifacts", "--registry", gone)


def test_a_damaged_file_and_a_broken_download_are_refused(hub: FakeHub, machine: Machine) -> None:
    content = files()
    damaged = bytearray(content[RANK])
    damaged[-1] ^= 1
    commit = hub.commit(REPOSITORY, {**content, RANK: bytes(damaged)})
    done = machine.kvtc("artifacts", "--registry", f"hf:{REPOSITORY}@{commit}", "--json")
    place = json.loads(done.stdout)[0]["registry"]
    assert "damaged" in machine.refusal("inspect", f"{place}/{PLACE}")

    hub.truncate = True
    second = hub.commit(REPOSITORY, {f"{PLACE}/card.json": content[f"{PLACE}/card.json"] + b"\n"})
    named = f"hf:{REPOSITORY}@{second}"
    assert "cannot be downloaded" in machine.refusal("artifacts", "--registry", named)
    # The next try goes on where this one broke off.
    hub.truncate = False
    assert machine.kvtc("artifacts", "--registry", named).returncode == 0


def test_a_damaged_artifact_is_not_published(
    hub: FakeHub, machine: Machine, tmp_path: Path
) -> None:
    copy = tmp_path / "toy" / "broken"
    shutil.copytree(SHIPPED, copy)
    with (copy / "rank0of1.safetensors").open("r+b") as file:
        file.write(b"\0")
    assert "damaged" in machine.refusal("publish", str(copy), f"hf:{REPOSITORY}")
    assert hub.commits == {}


@pytest.mark.parametrize("text", ["hf:", "hf:org", "hf:a/b/c", "hf:a/b@", "hf:a/b@c@d", "hf: a/b"])
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="names no hub repository"):
        parse_name(text)
    with pytest.raises(ArtifactError, match="names no hub repository"):
        hub_registry(text)


def test_hub_names_in_the_environment_are_not_cut_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "/a:hf:o/r@c:/half:hf:p/q@d")
    assert _environment() == ["/a", "hf:o/r@c", "/half", "hf:p/q@d"]
