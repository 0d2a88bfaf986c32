"""`kvtc config lmcache`: presets, overrides, and one clear line for everything wrong."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from kvtc_vllm.cli import main
from kvtc_vllm.config import ConfigError, preset_names
from kvtc_vllm.lmcache.command import lmcache_presets
from kvtc_vllm.lmcache.settings import load_settings


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], list[str]]:
    assert main(["config", "lmcache", *words]) == 0
    server, vllm = capsys.readouterr().out.splitlines()
    return shlex.split(server), shlex.split(vllm)


@pytest.mark.parametrize("name", lmcache_presets())
def test_every_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    server, vllm = printed(capsys, name, "model=org/model", "server.port=6000", "ratio=8")
    assert server[:2] == ["lmcache", "server"]
    module = json.loads(server[server.index("--server-module") + 1])
    assert module["module_path"] == "kvtc_vllm.lmcache.server_module"
    assert module["config"]["kvtc"] == {"ratio": 8, "model": "org/model"}
    assert vllm[:3] == ["vllm", "serve", "org/model"]
    transfer = json.loads(vllm[-1])
    assert transfer["kv_connector"] == "LMCacheMPConnector"
    assert transfer["kv_connector_extra_config"]["lmcache.mp.port"] == 6000
    assert f"lmcache-{name}" not in preset_names()


def test_plugin_route(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("fs-native", "model=m", "route=plugin", "l2.base_path=/srv/kv", "l2.num_workers=8")
    server, _ = printed(capsys, *words)
    spec = json.loads(server[server.index("--l2-adapter") + 1])
    assert spec["adapter_params"]["inner"]["base_path"] == "/srv/kv"
    assert spec["adapter_params"]["inner"]["num_workers"] == 8
    assert spec["eviction"] == {"eviction_policy": "LRU"}
    assert spec["serde"] == {"type": "kvtc", **spec["adapter_params"]["kvtc"]}


@pytest.mark.parametrize(
    "words",
    [
        ["s4", "model=m"],
        ["fs"],
        ["fs", "model=m", "rotio=8"],
        ["fs", "model=m", "server.prot=1"],
        ["fs", "model=m", "route=magic"],
        ["fs", "model"],
    ],
)
def test_mistakes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "lmcache", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_name_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "lmcache"]) == 0
    assert capsys.readouterr().out.count("\n") == len(lmcache_presets())


def test_the_documented_settings_are_the_described_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "lmcache", "--describe"]) == 0
    table = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "lmcache.md").read_text()
    assert table in page, "replace the table by the output of `kvtc config lmcache --describe`"
    defaults = {
        row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in table.splitlines()[2:]
    }
    settings = load_settings({"model": "m"})
    assert defaults.pop("model") == "required"
    for name, default in defaults.items():
        value = getattr(settings, name)
        assert default == (f"{value:g}" if isinstance(value, float) else str(value or "none"))


@pytest.mark.parametrize("given", [{}, {"model": "m", "max_workers": 65}, {"model": "m", "x": 1}])
def test_a_bad_setting_is_named_with_what_would_be_right(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"(model|max_workers|'x').*(give|allowed)"):
        load_settings(given)
