"""What every test gets: a quiet, offline vLLM on the CPU, and the reference model."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests.file_order import longest_first

# A pause of a shared machine is not a failure.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

# Before anything imports vLLM, which reads some of these once. A value from outside wins.
for _name, _value in {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)

if "KVTC_CACHE_DIR" not in os.environ:  # fingerprints of models that exist for a moment
    os.environ["KVTC_CACHE_DIR"] = tempfile.mkdtemp(prefix="kvtc-tests-")
    atexit.register(shutil.rmtree, os.environ["KVTC_CACHE_DIR"], ignore_errors=True)


def _keep_to_one_core() -> None:
    """Several test processes at once: a team of threads on every core would be in each other's way.

    A value from outside, and a test that sets its own, win.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw"):
        core = int(worker.removeprefix("gw")) % (os.cpu_count() or 1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


_keep_to_one_core()

ENGINE_TEST_SECONDS = 1200
REFERENCE_MODEL = Path(__file__).parent / "reference_model" / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives engine tests more time, sorts the files of several test processes, and skips tests
    marked `gpu` on a machine without CUDA."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        longest_first(items)
    for item in items:
        if item.get_closest_marker("vllm"):
            # Seconds on a quiet machine; a busy neighbour has made some ten times slower.
            item.add_marker(pytest.mark.timeout(ENGINE_TEST_SECONDS))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # here, because it takes seconds and most selections hold no such test

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish() -> None:
    """What was imported is no garbage. vLLM collects nine times for every engine, and each time
    visits all that there is: with all test modules, a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What nobody takes back is a leak to native libraries, which report it."""
    gc.unfreeze()


def pytest_runtest_setup() -> None:
    """Counting what is not published is an error, wherever the connector is loaded at all."""
    metrics = sys.modules.get("kvtc_vllm.offload.stats")
    if metrics is not None:
        metrics.strict = True  # type: ignore[attr-defined]


def _silence_stderr() -> None:
    """Keeps pytest's closing line the last one.

    Triton's and vLLM's native libraries write reports of leaked objects while the interpreter
    ends. A crash in that phase still shows, as the exit status.
    """
    if "vllm" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


# Not a pytest hook: pytest puts the real stderr back after its last one.
atexit.register(_silence_stderr)


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """Directory of the small Llama-architecture model that this project trained itself."""
    missing = [n for n in ("config.json", "tokenizer.json") if not (REFERENCE_MODEL / n).is_file()]
    if missing or not list(REFERENCE_MODEL.glob("*.safetensors")):
        pytest.fail(
            f"the reference model in {REFERENCE_MODEL} is missing or incomplete; it is committed, "
            "so restore it with `git checkout -- tests/reference_model`"
        )
    return REFERENCE_MODEL
