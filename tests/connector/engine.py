"""vLLM engines in the test process, small enough that caches overflow."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvtc_vllm.config import kv_transfer_config
from kvtc_vllm.evaluation.replay.in_process import rest_in_idle_steps

# One process: start-up takes seconds instead of half a minute, and the worker is reachable.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

BLOCK_SIZE = 32


@contextlib.contextmanager
def engine(model: Path, extra: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` with our connector (`extra`: its configuration) or none."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 128,
        # The cache is as large as the line above says; engines of other processes need some too.
        "gpu_memory_utilization": 0.3,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 8,
        "seed": 0,
        "disable_log_stats": False,
        **options,
    }
    if extra is not None:
        # What can be loaded is, and stored at once: on a small model and a busy CPU recomputing
        # may be faster, and encoding is a good part of the work.
        transfer = kv_transfer_config({"load_gate": False, "encode_share": 1, **extra})
        # The policy is left at vLLM's default, "fail": the connector has to change it itself.
        del transfer["kv_load_failure_policy"]
        settings["kv_transfer_config"] = KVTransferConfig(**transfer)
    llm = None
    set_imports_aside()
    _override_kernels_once()
    try:
        with _without_collections():
            llm = LLM(model=str(model), **settings)
        _count_every_step(llm.llm_engine)
        rest_in_idle_steps(llm)
        yield llm
    finally:
        with _without_collections():
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
                del llm
            # A worker that was refused leaves its connector in vLLM's process-wide state.
            ensure_kv_transfer_shutdown()
            cleanup_dist_env_and_memory()
        gc.collect()


FEW_OBJECTS = 100_000
"""Python visits so many in a moment."""


def set_imports_aside() -> None:
    """What was imported is no garbage: collections, and the connector's search for the model, need
    not visit it. With all test modules that is a million objects, twice or more for an engine."""
    if len(gc.get_objects()) > FEW_OBJECTS:
        gc.collect()
        gc.freeze()


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """vLLM collects garbage nine times as an engine starts and ends, and each time visits all that
    the tests have imported: two thirds of what starting and ending take. It also sets aside what
    its engine is made of, and takes back all that anybody did."""
    calls = (gc.collect, gc.freeze, gc.unfreeze)
    gc.collect = lambda generation=2: 0
    gc.freeze = gc.unfreeze = lambda: None
    try:
        yield
    finally:
        gc.collect, gc.freeze, gc.unfreeze = calls


def _override_kernels_once() -> None:
    """For every engine vLLM's CPU platform puts functions in the place of the same Triton kernels,
    and looks for them at every name of every module."""
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:
        return  # an older vLLM
    register = dispatcher.register_kernels

    def register_new(overrides: Mapping[str, Any]) -> None:
        new = {name: way for name, way in overrides.items() if name not in dispatcher._registry}
        if new:
            register(new)

    if register.__name__ != register_new.__name__:
        dispatcher.register_kernels = register_new


def _count_every_step(engine: Any) -> None:
    """What a step without output did, such as ordering a load: up to vLLM 0.27 a server counts it,
    and `LLM` does not."""
    import vllm

    if tuple(map(int, vllm.__version__.split(".")[:2])) >= (0, 28):
        return
    core, manager = engine.engine_core, engine.logger_manager
    get_output = core.get_output

    def counted() -> Any:
        outputs = get_output()
        if manager is not None and outputs.scheduler_stats is not None and not outputs.outputs:
            manager.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=None)
        return outputs

    core.get_output = counted


def greedy(llm: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Continuations of token-id prompts."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        use_tqdm=False,
    )
    drain(llm)
    return [list(output.outputs[0].token_ids) for output in outputs]


def drain(llm: Any) -> None:
    """Step an in-process engine until its stores are done, as a server's loop does by itself."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    connector = core.scheduler.connector if core is not None else None
    while connector is not None and connector.has_pending_push_work():
        llm.llm_engine.step()


def metrics(llm: Any) -> dict[str, float]:
    """Counters and gauges by name, "name/reason" for those with a reason, and so of times."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            reason = metric.labels.get("reason") or metric.labels.get("times")
            name = metric.name.removeprefix("vllm:")
            name = f"{name}/{reason}" if name.startswith("kvtc_") and reason else name
            values[name] = values.get(name, 0.0) + metric.value
    return values


def worker_arena() -> Any:
    """The memory arena of the worker in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()._worker.arena


def texts(model: Path, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Prompts of exactly `tokens` tokens from the evaluation split of the reference data."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(model.parent))
    import data

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    pieces = data.texts("eval", "mix", characters=12 * count * tokens, seed=seed)
    stream = tokenizer.encode("\n\n".join(pieces))
    assert len(stream) >= count * tokens, "not enough evaluation text"
    return [stream[i * tokens : (i + 1) * tokens] for i in range(count)]
