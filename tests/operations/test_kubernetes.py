"""Manifests and compose file: the engine's arguments are right, and the volume's rights too."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtc_vllm.config import load_config
from kvtc_vllm.tiers.disk import DiskError, DiskStore
from tests.reliability.blobs import NAMESPACE, blob_of, key_of
from tools import manifests

ROOT = manifests.ROOT


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifests.MANIFEST.read_text()))


def pod() -> dict[str, Any]:
    (deployment,) = (found for found in objects() if found["kind"] == "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


def stack_model() -> dict[str, Any]:
    values = yaml.safe_load(manifests.VALUES.read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    return dict(model)


def arguments() -> dict[str, list[str]]:
    compose = yaml.safe_load(manifests.COMPOSE.read_text())
    return {
        "manifest": pod()["containers"][0]["args"],
        "values": stack_model()["vllmConfig"]["extraArgs"],
        "compose": compose["services"]["vllm"]["command"],
    }


@pytest.mark.parametrize("source", ["manifest", "values", "compose"])
def test_the_engine_takes_the_configuration(source: str) -> None:
    words = arguments()[source]
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "KVTCConnector"
    config = load_config(transfer["kv_connector_extra_config"])
    assert config.codec == "kvtc"
    if source != "compose":
        assert config.disk_path in ("/cache/kvtc", "/data/kvtc")


def prepare_commands() -> dict[str, str]:
    container = stack_model()["initContainer"]
    return {
        "/cache": pod()["initContainers"][0]["command"][-1],
        "/data": container["args"][-1],
    }


@pytest.mark.parametrize("volume", ["/cache", "/data"])
def test_the_directory_is_private_again_after_kubernetes_opened_it(
    volume: str, tmp_path: Path
) -> None:
    """fsGroup makes everything on a volume writable by its group; the tier refuses that."""
    command = prepare_commands()[volume].replace(volume, shlex.quote(str(tmp_path)))
    tier = tmp_path / "kvtc"

    def prepare() -> None:
        subprocess.run(["sh", "-c", command], check=True)

    prepare()
    store = DiskStore(tier, NAMESPACE, min_free=0)
    key = key_of(1)
    store.write(key, blob_of(key))
    store.close()
    for place, folders, files in os.walk(tmp_path):
        for name in (".", *folders, *files):
            path = Path(place) / name
            mode = 0o2770 if path.is_dir() else 0o660
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
    with pytest.raises(DiskError, match="others may write it"):
        DiskStore(tier, NAMESPACE, min_free=0)
    prepare()
    store = DiskStore(tier, NAMESPACE, min_free=0)
    assert [entry.key for entry in store.scan()] == [key]
    assert store.read(key) == blob_of(key)
    store.close()


def test_pods_run_as_the_user_of_the_image() -> None:
    dockerfile = manifests.DOCKERFILE.read_text()
    (user,) = (line.split()[1] for line in dockerfile.splitlines() if line.startswith("USER "))
    values = yaml.safe_load(manifests.VALUES.read_text())["servingEngineSpec"]
    for context in (pod()["securityContext"], values["securityContext"]):
        assert str(context["runAsUser"]) == user
        assert context["fsGroupChangePolicy"] == "OnRootMismatch"


def test_manifests_are_valid_by_the_schema_of_kubernetes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("kubernetes_validate", reason="it is in the extra deploy")
    manifests.check_objects(objects(), "ours")
    assert "are valid" in capsys.readouterr().out
    wrong = objects()
    wrong[0]["spec"]["acessModes"] = []
    with pytest.raises(SystemExit, match="ours, PersistentVolumeClaim"):
        manifests.check_objects(wrong, "ours")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "NEEDED", ("no_such_module",))
    monkeypatch.setattr("sys.argv", ["manifests"])
    with pytest.raises(SystemExit, match=r"no_such_module.*kvtc-vllm\[deploy\]"):
        manifests.main()
