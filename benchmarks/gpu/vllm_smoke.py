"""The first thing to run with vLLM on a GPU: does the connector work there, per attention backend?

    python -m benchmarks.gpu.vllm_smoke [--model DIR] [--registry DIR]

The reference model in process, without compilation, a process for every attention backend and
codec. A row a check, and on after a failure, so that one run shows all of them; ends with status 1
if any failed. Codec 2 has no shipped artifact of the reference model: give a registry that has one
(`kvtc calibrate --codec kvtc2`), or another model. Checks: `registered` (caches: shapes, strides,
dtypes; RoPE tables found), `reload` (evicted prompts come back: for `raw` bit for bit, tokens and
KV blocks; for kvtc within the error that the artifact promises) and `counters` (what was offered
was loaded, nothing failed).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import guarded, report, rows_of
from benchmarks.gpu.report import append, parser
from kvtc_vllm.codec.artifact import KINDS
from tests.connector.engine import drain

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference_model" / "model"
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
DEFAULT_BACKEND = "default"
"""vLLM's choice: on a CPU there is no other."""
CODECS = ("raw", "kvtc-16x")
CODEC_2 = "kvtc2-16x"
CHECKS = ("registered", "reload", "counters")
CHUNK = 128
RELOADED = 5 * CHUNK
PROMPTS = 3
ANSWER = 16
REST = {"raw": 10, "kvtc-16x": 138, CODEC_2: 138}
"""Tokens of a prompt past what is reloaded: less than a block, so that vLLM's own cache and the
tier hold the same; for kvtc the recent window besides."""
CHILD_SECONDS = 125.0


def main() -> int:
    """Run every backend and codec."""
    made = parser("vllm_smoke", __doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--backends", help="names of attention backends; default by device")
    made.add_argument("--codecs", help="names of presets; codec 2 by default with --registry")
    made.add_argument("--model", type=Path, default=REFERENCE)
    made.add_argument("--registry", type=Path, help="where artifacts are looked for first")
    made.add_argument("--child", nargs=2, metavar=("BACKEND", "CODEC"))
    args = made.parse_args()
    if args.child is not None:
        backend, codec = args.child
        device = torch.device(args.device)
        call = partial(check, backend, codec, device, args.model, args.registry)
        return guarded(call, check="process", ok=False)
    device = torch.device(args.device)
    default = BACKENDS if device.type == "cuda" else (DEFAULT_BACKEND,)
    some = CODECS if args.registry is None else (*CODECS, CODEC_2)
    failed = 0
    for backend in args.backends.split(",") if args.backends else default:
        for codec in args.codecs.split(",") if args.codecs else some:
            failed += _run(backend, codec, args)
    return int(failed > 0)


def _run(backend: str, codec: str, args: argparse.Namespace) -> int:
    """All checks of one process; how many of them failed or never came."""
    out, device = args.out, torch.device(args.device)
    about = {"bench": "vllm_smoke", "backend": backend, "codec": codec, "model": args.model.name}
    passed = 0
    arguments = ["--device", str(device), "--model", str(args.model), "--child", backend, codec]
    if args.registry is not None:
        arguments += ["--registry", str(args.registry)]
    try:
        for row in rows_of(
            "benchmarks.gpu.vllm_smoke", arguments, out.with_name("vllm_smoke.log"), CHILD_SECONDS
        ):
            append(out, [about | row], device)
            passed += row["ok"]
    except RuntimeError as error:
        append(out, [about | {"check": "process", "ok": False, "error": str(error)}], device)
        return 1
    return len(CHECKS) - passed


def check(
    backend: str, codec: str, device: torch.device, model: Path, registry: Path | None
) -> None:
    """The child: one engine and its checks."""
    from kvtc_vllm.connector import register
    from tests.connector.engine import engine, texts

    register()  # the plugin's entry point is only there when the package was installed
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "block_size": 16 if device.type == "cuda" else 32,
        "num_gpu_blocks_override": 512,
    }
    if backend != DEFAULT_BACKEND:
        options["attention_backend"] = backend
    if device.type == "cuda":
        options["gpu_memory_utilization"] = 0.3
    extra: dict[str, Any] = {"preset": codec, "memory_bytes": "256MiB"}
    if registry is not None:
        extra["registry"] = [str(registry)]
    prompts = texts(model, count=PROMPTS, tokens=RELOADED + REST[codec])
    with _watched_registration(), engine(model, extra, **options) as llm:
        report({"check": "reload", **_outcome(lambda: reload(llm, prompts, codec))})
        report({"check": "counters", **_outcome(counted)})


def _outcome(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"ok": True, **call()}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


_layouts: list[Any] = []
"""Of the paged cache that was registered last."""


@contextlib.contextmanager
def _watched_registration() -> Iterator[None]:
    """Reports what vLLM registers, before the connector has a chance to refuse it.

    Later the RoPE tables can't be found any more: vLLM hides what it made from the garbage
    collector's list once it has started.
    """
    from kvtc_vllm.connector import connector
    from kvtc_vllm.vllm_cache.layout import paged_layouts

    build_worker = connector.build_worker

    def watched(vllm_config: Any, config: Any, geometry: Any, caches: Any, *more: Any) -> Any:
        (group,) = geometry.groups
        outcome = _outcome(lambda: registered(vllm_config, group.layer_names, caches))
        report({"check": "registered", **outcome})
        worker = build_worker(vllm_config, config, geometry, caches, *more)
        _layouts.extend(paged_layouts(caches, geometry))
        return worker

    vars(connector)["build_worker"] = watched
    try:
        yield
    finally:
        vars(connector)["build_worker"] = build_worker


def registered(
    vllm_config: Any, names: tuple[str, ...], caches: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The paged caches, the attention that reads them, and the model's RoPE tables."""
    from kvtc_vllm.vllm_cache.rotary import find_ropes

    ropes, layer_rope = find_ropes(vllm_config, names)
    tensors = list(caches.values())
    attention = vllm_config.compilation_config.static_forward_context[names[0]]
    found = {
        "layers": len(tensors),
        "shapes": sorted({str(tuple(t.shape)) for t in tensors}),
        "strides": sorted({str(t.stride()) for t in tensors}),
        "dtypes": sorted({str(t.dtype) for t in tensors}),
        "cache_device": str(tensors[0].device),
        "storages": len({t.untyped_storage().data_ptr() for t in tensors}),
        "storage_bytes": tensors[0].untyped_storage().nbytes(),
        "attention": type(getattr(attention, "impl", attention)).__name__,
        "rope_tables": [f"{tuple(r.cos_sin.shape)} {r.cos_sin.dtype}" for r in ropes],
        "layer_rope": list(layer_rope),
        "neox": [rope.neox for rope in ropes],
    }
    assert layer_rope == (0,) * len(names), f"not one RoPE for all layers: {found}"
    return found


def reload(llm: Any, prompts: list[list[int]], codec: str) -> dict[str, Any]:
    """Prompts again after the GPU cache was reset, against the blocks and words of before."""
    cold = [_ask(llm, prompt) for prompt in prompts]
    drain(llm)
    # The same pieces of the prompt are computed as after a reload, from vLLM's own blocks.
    kept = [_ask(llm, prompt) for prompt in prompts]
    drain(llm)
    assert llm.reset_prefix_cache()
    before = _loaded_tokens()
    warm = [_ask(llm, prompt) for prompt in prompts]
    drain(llm)
    loaded = _loaded_tokens() - before
    assert loaded == PROMPTS * RELOADED, f"{loaded} tokens loaded, not {PROMPTS * RELOADED}"
    pairs = [(a[1][side], b[1][side]) for a, b in zip(cold, warm, strict=True) for side in (0, 1)]
    found: dict[str, Any] = {
        "loaded_tokens": loaded,
        "blocks_equal": all(torch.equal(a, b) for a, b in pairs),
        "words_equal_to_prefix_hit": _agreement(kept, warm),
        "words_equal_to_cold": _agreement(cold, warm),
        "k_error": _error(pairs[::2]),
        "v_error": _error(pairs[1::2]),
    }
    if codec == "raw":
        assert found["blocks_equal"], f"KV blocks differ: {found}"
        assert found["words_equal_to_prefix_hit"] == 1, f"words differ: {found}"
    else:
        from kvtc_vllm.artifact.round_trip import held_out_error, largest_error

        transfer = _worker_connector()._worker.transfers[0]
        names = transfer.codec.artifact.section_names
        promised = {name: round(held_out_error(transfer.codec, name), 5) for name in names}
        way = type(transfer).__name__
        found |= {"promised": promised, "transfer": way}
        on_gpu = _layouts[-1].device.type == "cuda"
        assert not on_gpu or way == "KernelTransfer", f"not by kernels: {found}"
        for name in names:
            sides = [side for side, tensor in enumerate(KINDS) if tensor in name]
            own = [pair for side in sides for pair in pairs[side::2]]
            assert 0 < _error(own) <= largest_error(promised[name]), f"{name} is off: {found}"
    return found


def counted() -> dict[str, Any]:
    """Counters over the engine's life."""
    from benchmarks.gpu.closed_loop import counters, tier_counters

    values = tier_counters({}, {}, counters())
    assert values["from_tier"], f"counters disagree: {values}"
    assert values["hit_tokens"] == PROMPTS * RELOADED, f"hits: {values}"
    assert not values["dropped_stores"], f"stores were dropped: {values}"
    return values


def _ask(llm: Any, prompt: list[int]) -> tuple[list[int], tuple[torch.Tensor, torch.Tensor]]:
    """Greedy words, and K and V of the prompt's part that can be reloaded, on the CPU."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    engine = llm.llm_engine
    engine.add_request("only", {"prompt_token_ids": prompt}, settings)
    kv = None
    while True:
        for output in engine.step():
            if kv is None and output.outputs[0].token_ids:
                kv = _blocks_of_running(engine)
            if output.finished:
                assert kv is not None
                return list(output.outputs[0].token_ids), kv


def _blocks_of_running(engine: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scheduler = engine.engine_core.engine_core.scheduler
    (request_id,) = scheduler.requests
    layout = _layouts[-1]
    if layout.device.type == "cuda":
        torch.cuda.synchronize(layout.device)
    ids = scheduler.kv_cache_manager.get_block_ids(request_id)[0]
    k, v = layout.gather(ids[: RELOADED // layout.block_size])
    return k.cpu(), v.cpu()


def _worker_connector() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def _loaded_tokens() -> int:
    from benchmarks.gpu.closed_loop import counters

    return round(counters().get("kvtc_loaded_tokens", 0))


def _agreement(left: list[Any], right: list[Any]) -> float:
    same = [
        a == b for x, y in zip(left, right, strict=True) for a, b in zip(x[0], y[0], strict=True)
    ]
    return round(sum(same) / len(same), 4)


def _error(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Squared error over squared deviation from the mean of each element over tokens."""
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    total = sum(float((a.float() - a.float().mean(0)).square().sum()) for a, _ in pairs)
    return round(error / total, 5)


if __name__ == "__main__":
    sys.exit(main())
