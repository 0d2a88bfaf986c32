"""Presets: YAML files in `configs/` whose keys are those of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kvtc_vllm.config.values import ConfigError, shown


def preset_directory() -> Path:
    """Directory of the shipped presets: in the wheel, else in the source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names of the connector's shipped presets, sorted; LMCache's are not among them."""
    names = (p.stem for p in preset_directory().glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("lmcache-"))


def load_preset(name: object) -> dict[str, Any]:
    """Keys of one preset without its `description`. Raises ConfigError."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"preset={shown(name)} is not known; allowed: {', '.join(names)}")
    content = _read_preset(str(name))
    content.pop("description", None)
    return content


def preset_description(name: str) -> str:
    """What a shipped preset says of itself."""
    return str(_read_preset(name).get("description", ""))


def _read_preset(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((preset_directory() / f"{name}.yaml").read_text()))
