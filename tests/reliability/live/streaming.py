"""A server's engine that is asked one streaming session twice, for a test.

    python -m tests.reliability.live.streaming MODEL

Prints two lines of JSON, of an engine without a tier and of one with it: the answers, and the
tokens that the tier gave.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from kvtc_vllm.config import kv_transfer_config
from tests.connector.engine import BLOCK_SIZE, texts
from tests.reliability.live.replica import MARK
from tests.reliability.live.stepping import raw

TURNS = (640, 64, 192)
"""Tokens that the turns of the session add."""


async def session(engine: Any, name: str, ids: list[int]) -> list[int]:
    """All tokens that the engine says."""
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    async def turns() -> AsyncGenerator[Any, None]:
        first = 0
        for tokens in TURNS:
            piece = ids[first : first + tokens]
            yield StreamingInput(prompt={"prompt_token_ids": piece})  # type: ignore[arg-type]
            first += tokens

    settings = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    said: list[int] = []
    async for output in engine.generate(turns(), settings, name):
        said += output.outputs[0].token_ids
    return said


def loaded_tokens() -> float:
    from prometheus_client import REGISTRY

    name = "vllm:kvtc_loaded_tokens"
    families = [family for family in REGISTRY.collect() if family.name == name]
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == f"{name}_total")


async def ask(model: Path, tier: bool) -> dict[str, Any]:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options: dict[str, Any] = {}
    if tier:
        extra = kv_transfer_config(raw(load_gate=False, encode_share=1))
        options["kv_transfer_config"] = KVTransferConfig(**extra)
    arguments = AsyncEngineArgs(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=128,
        gpu_memory_utilization=0.3,
        **options,
    )
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        ids = texts(model, count=1, tokens=sum(TURNS))[0]
        answers = []
        for turn in range(2):
            answers.append(await session(engine, f"session-{turn}", ids))
            await engine.reset_prefix_cache()
        await engine.do_log_stats()
        return {"answers": answers, "loaded": loaded_tokens()}
    finally:
        engine.shutdown()


if __name__ == "__main__":
    for tier in (False, True):
        print(MARK + json.dumps(asyncio.run(ask(Path(sys.argv[1]), tier))), flush=True)
