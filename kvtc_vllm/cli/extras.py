"""What only some commands need, and the extra that brings it."""

from __future__ import annotations

import importlib.util

from kvtc_vllm.config import ConfigError

PACKAGES = {
    "bench": ("aiohttp",),
    "calibrate": ("matplotlib", "tqdm"),
    "eval": ("constriction", "matplotlib", "tqdm"),
}
"""By extra, what its command can't start without."""


def require(what: str, extra: str, *more: str) -> None:
    """Raise ConfigError, one sentence that names the extra, if a package is missing for `what`."""
    missing = [name for name in (*PACKAGES[extra], *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {', '.join(missing)}: pip install 'kvtc-vllm[{extra}]'")
