"""One vLLM engine as a process of its own; prints what it said as one line of JSON.

    python -m tests.lmcache.client '{"lmcache_port": 5555, "prompts": 3, "tokens": 1100}'
    python -m tests.lmcache.client '{"kvtc": {...}, "prompts": 3, "tokens": 1100}'

lmcache_port: LMCache's connector; its server then stores what this engine computes.
kvtc: our own connector, with this extra configuration; every prompt is then asked twice, the
second time with an empty prefix cache. Neither: no connector. transfer: LMCache's transfer mode.
linger: seconds before the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_DISABLE_BANNER", "1")
os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODEL = Path(__file__).parents[1] / "reference_model" / "model"
MARK = "CLIENT "
STORE_SECONDS = 3.0
"""Stores of our own connector end after the answer; this is what they are given."""


def connector(request: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's kv_transfer_config."""
    from kvtc_vllm.config import kv_transfer_config

    if "lmcache_port" in request:
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://localhost",
                "lmcache.mp.port": request["lmcache_port"],
                "lmcache.mp.mp_transfer_mode": request.get("transfer", "auto"),
            },
        }
    return kv_transfer_config(request["kvtc"]) if "kvtc" in request else None


def main() -> None:
    """Run the request on the command line."""
    from tests.connector.engine import engine, greedy, texts

    # The engine in a process of its own: vLLM 0.32's start-up fails in a process that has loaded
    # numba, as LMCache has. Spawned, so that it inherits nothing.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    from vllm import SamplingParams

    request = json.loads(sys.argv[1])
    prompts = texts(MODEL, request["prompts"], request["tokens"])
    transfer = connector(request)
    options: dict[str, Any] = {"dtype": "bfloat16"}
    if transfer is not None:
        from vllm.config import KVTransferConfig

        options["kv_transfer_config"] = KVTransferConfig(**transfer)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    with engine(MODEL, None, **options) as llm:
        if "kvtc" in request:
            greedy(llm, prompts, 1)
            time.sleep(STORE_SECONDS)
            assert llm.reset_prefix_cache()
        answers, cached = [], []
        for ids in prompts:  # one at a time: batches change bits in bfloat16
            (out,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
            answers.append(list(out.outputs[0].token_ids))
            cached.append(out.num_cached_tokens)
        print(MARK + json.dumps({"answers": answers, "cached": cached}), flush=True)
        time.sleep(request.get("linger", 0))


if __name__ == "__main__":
    main()
