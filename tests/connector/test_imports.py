"""A process that serves imports nothing that only fitting, measuring or a GPU need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# vLLM itself imports tqdm, so what counts is who asks.
PROGRAM = """
import builtins, json, sys

asked, usual = set(), builtins.__import__

def noting(name, globals=None, *rest, **named):
    if globals and str(globals.get("__name__")).startswith("kvtc_vllm"):
        asked.add(name.partition(".")[0])
    return usual(name, globals, *rest, **named)

builtins.__import__ = noting
import kvtc_vllm.connector.connector
print(json.dumps([sorted(asked), sorted(n for n in sys.modules if n.startswith("kvtc_vllm."))]))
"""


def test_the_connector_imports_no_fitting_code_and_no_kernels() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    asked, ours = json.loads(result.stdout.splitlines()[-1])
    assert "torch" in asked
    assert not {"matplotlib", "tqdm", "triton", "nvidia"} & set(asked)
    assert "kvtc_vllm.artifact.directory" in ours
    upper = ("calibration", "evaluation", "lmcache", "cli")
    assert [name for name in ours if name.split(".")[1] in upper] == []
    assert "kvtc_vllm.codec.kernels.paged_codec" not in ours
