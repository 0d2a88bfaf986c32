"""The kernels that serving launches compile for real GPUs, as `make check-kernels` wants them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need Triton, which vLLM brings: pip install triton")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Triton keeps what one of these tests has compiled, for the next."""
    return tmp_path_factory.mktemp("triton")


def run(program: str, kept: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: in this one the kernels are interpreted."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(kept)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "codec"), [("80", "kvtc"), ("90", "kvtc"), ("90", "kvtc2")])
def test_kernels_of_an_8b_model(capability: str, codec: str, kept: Path) -> None:
    ended = run(
        "import sys; from benchmarks.gpu.offline.check_kernels import main; "
        f"sys.exit(main(['{capability}', '{codec}', '--quick']))",
        kept,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


FINDS = """
import dataclasses
from benchmarks.gpu.offline import check_kernels, compiled
stores = {"STG.E.128": 2}
good = compiled.MachineCode("_scatter_kernel", "", {}, "mul.rn.f32", 32, 0, 0, stores, 128)
assert check_kernels.inspect(good) == []
for change in (
    {"local": 8}, {"stack": 16}, {"operations": {"STL": 1}}, {"ptx": "fma.rn.f32 a"},
    {"operations": {"STG.E.U16": 8}}, {"operations": {"LDG.E.U8": 8}},
):
    assert len(check_kernels.inspect(dataclasses.replace(good, **change))) == 1, change
check_kernels.MOST_PER_CODE = dict.fromkeys(check_kernels.MOST_PER_CODE, 1.0)
assert len(check_kernels.check_tiles(90)) == 6
check_kernels.MOST_PER_STEP_CODE = dict.fromkeys(check_kernels.MOST_PER_STEP_CODE, 1.0)
assert len(check_kernels.check_step_tiles(90)) == 9
"""


@pytest.mark.slow
def test_what_is_wrong_is_found(kept: Path) -> None:
    ended = run(FINDS, kept)
    assert ended.returncode == 0, ended.stdout + ended.stderr
