"""Artifacts to a hub and from it, by commands in processes that read the endpoint as they start."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtc_vllm.artifact.hub import hub_registry, parse_name
from kvtc_vllm.artifact.registry import ENVIRONMENT_VARIABLE, _environment
from kvtc_vllm.codec.errors import ArtifactError
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


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> Iterator[dict[str, str]]:
    with hub.serving() as endpoint:
        yield {
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "token",
            "XDG_DATA_HOME": str(tmp_path / "data"),
            "PYTHONPATH": str(ROOT),
        }


def kvtc(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvtc_vllm.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
    )


def refusal(environment: dict[str, str], *words: str) -> str:
    done = kvtc(environment, *words)
    assert done.returncode == 2, done.stdout
    # Beside what huggingface_hub warns of by itself.
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("kvtc "))
    assert "Traceback" not in done.stderr
    return line


def files() -> dict[str, bytes]:
    """The shipped artifact as it lies in a repository."""
    return {
        f"{PLACE}/{path.name}": path.read_bytes() for path in SHIPPED.iterdir() if path.is_file()
    }


def test_what_is_published_is_found_and_used_offline(
    hub: FakeHub, environment: dict[str, str], reference_model: Path
) -> None:
    done = kvtc(environment, "publish", str(SHIPPED), f"hf:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    name = done.stdout.strip()
    (commit,) = hub.commits[REPOSITORY]
    assert name == f"hf:{REPOSITORY}@{commit}"
    card = hub.commits[REPOSITORY][commit]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: kvtc-vllm\n")
    (command,) = re.findall(r"\$\((kvtc config [^)]*)\)", card)
    done = kvtc(environment, *shlex.split(command.replace("COMMIT", commit))[1:])
    assert json.loads(done.stdout)["kv_connector_extra_config"]["registry"] == [name]
    assert f"]({PLACE}/report.png)" in card
    assert hub.commits[REPOSITORY][commit][RANK] == (SHIPPED / "rank0of1.safetensors").read_bytes()

    listed = ["artifacts", "--registry", name, "--model", str(reference_model), "--json"]
    done = kvtc(environment, *listed)
    assert done.returncode == 0, done.stderr
    place = json.loads(done.stdout)[0]
    assert commit in place["registry"]
    (found,) = place["artifacts"]
    assert (found["artifact"], found["fits"]) == (PLACE, True)
    # Safetensors and cards, and nothing else of what lies there.
    assert sorted(hub.gets) == sorted([f"{PLACE}/card.json", RANK])
    # What it finds is whole: every rank file is checked.
    done = kvtc(environment, "inspect", str(Path(place["registry"]) / PLACE))
    assert done.returncode == 0, done.stderr

    offline = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = kvtc(offline, *listed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == place


def test_a_name_without_a_commit_is_told_the_newest(
    hub: FakeHub, environment: dict[str, str]
) -> None:
    commit = hub.commit(REPOSITORY, files())
    for wrong in ("", "@main", f"@{commit[:8]}"):
        said = refusal(environment, "artifacts", "--registry", f"hf:{REPOSITORY}{wrong}")
        assert "the full hash of a commit must follow" in said
    said = refusal(environment, "artifacts", "--registry", f"hf:{REPOSITORY}")
    assert f"it is now at hf:{REPOSITORY}@{commit}" in said


def test_foreign_and_missing_repositories_are_one_line(
    hub: FakeHub, environment: dict[str, str]
) -> None:
    foreign = hub.commit("org/model", {"model.safetensors": b"x", "config.json": b"{}"})
    named = f"hf:org/model@{foreign}"
    assert "holds no KVTC artifact" in refusal(environment, "artifacts", "--registry", named)
    assert hub.gets == []
    gone = f"hf:org/gone@{'0' * 40}"
    assert f"{gone}: cannot be downloaded" in refusal(environment, "artifacts", "--registry", gone)
    away = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot be downloaded" in refusal(away, "artifacts", "--registry", gone)


def test_a_damaged_file_and_a_broken_download_are_refused(
    hub: FakeHub, environment: dict[str, str]
) -> None:
    content = files()
    damaged = bytearray(content[RANK])
    damaged[-1] ^= 1
    commit = hub.commit(REPOSITORY, {**content, RANK: bytes(damaged)})
    done = kvtc(environment, "artifacts", "--registry", f"hf:{REPOSITORY}@{commit}", "--json")
    place = json.loads(done.stdout)[0]["registry"]
    assert "damaged" in refusal(environment, "inspect", f"{place}/{PLACE}")

    hub.truncate = True
    second = hub.commit(REPOSITORY, {f"{PLACE}/card.json": content[f"{PLACE}/card.json"] + b"\n"})
    named = f"hf:{REPOSITORY}@{second}"
    assert "cannot be downloaded" in refusal(environment, "artifacts", "--registry", named)
    # The next try goes on where this one broke off.
    hub.truncate = False
    assert kvtc(environment, "artifacts", "--registry", named).returncode == 0


def test_a_damaged_artifact_is_not_published(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "toy" / "broken"
    shutil.copytree(SHIPPED, copy)
    with (copy / "rank0of1.safetensors").open("r+b") as file:
        file.write(b"\0")
    assert "damaged" in refusal(environment, "publish", str(copy), f"hf:{REPOSITORY}")
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
