"""A vLLM engine whose prefixes are stored with one method, dropped and replayed."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.replay.connector import MODULE, NAME
from kvtc_vllm.evaluation.replay.in_process import rest_in_idle_steps
from kvtc_vllm.evaluation.replay.scoring import PROCESSOR, forced
from kvtc_vllm.evaluation.scores import Scores
from kvtc_vllm.evaluation.tasks import Example

DRAIN_STEPS = 100_000


@dataclass(frozen=True)
class Request:
    """One example to be scored. salt: requests share cached prefixes only under the same one."""

    example: Example
    salt: str
    result: Path
    reference: Path | None = None
    exact: bool = False

    @property
    def prompt(self) -> list[int]:
        """Token ids before the scored target."""
        return self.example.prompt


@dataclass(frozen=True)
class OpenRequest:
    """A prompt (token ids) to be continued greedily until a stop string or for `max_tokens`."""

    prompt: list[int]
    salt: str
    stop: tuple[str, ...]
    max_tokens: int


class ReplayEngine:
    """Owns a `vllm.LLM` in this process. One at a time; call `close` when done."""

    def __init__(self, model: str, method: Method, chunk_tokens: int, options: dict[str, Any]):
        # Before vLLM is imported. One process: the tier and its counters are at hand.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import KVTransferConfig

        self.window = method.window
        settings: dict[str, Any] = {
            "dtype": "bfloat16",
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
            "async_scheduling": False,
            "logits_processors": [PROCESSOR],
            **options,
        }
        self._llm = LLM(
            model=model,
            kv_transfer_config=KVTransferConfig(
                kv_connector=NAME,
                kv_connector_module_path=MODULE,
                kv_role="kv_both",
                kv_connector_extra_config=method.connector_config(chunk_tokens),
            ),
            **settings,
        )
        rest_in_idle_steps(self._llm)
        settled = self._llm.llm_engine.vllm_config
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        self.chunk_tokens = int(scheduler.connector.chunk_tokens)
        """As the connector settled on, for the model's blocks."""
        self.block_size = int(scheduler.connector.boundary_tokens)
        self.max_model_len = int(settled.model_config.max_model_len)

    def run(self, requests: Sequence[Request]) -> list[Scores]:
        """Score requests; returns when all their chunks are stored."""
        sampling = [
            forced(r.example.target, r.result, reference=r.reference, exact=r.exact)
            for r in requests
        ]
        self._generate(requests, sampling)
        return [Scores.load(request.result) for request in requests]

    def generate(self, requests: Sequence[OpenRequest]) -> list[str]:
        """Greedy continuations without their stop strings; returns when all chunks are stored."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(temperature=0.0, max_tokens=r.max_tokens, stop=list(r.stop))
            for r in requests
        ]
        return [output.outputs[0].text for output in self._generate(requests, sampling)]

    def drop_gpu_cache(self) -> None:
        """Forget every cached block of the engine; the tier keeps its chunks."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to drop its prefix cache: requests are running")

    def counters(self) -> dict[str, float]:
        """The connector's counters so far, by name without the `kvtc_` prefix."""
        values: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            name = metric.name.removeprefix("vllm:")
            if name.startswith("kvtc_") and hasattr(metric, "value"):
                name = name.removeprefix("kvtc_")
                values[name] = values.get(name, 0.0) + metric.value
        return values

    def reloadable(self, stored_tokens: int, prompt_tokens: int) -> int:
        """Tokens of a prompt that must come from the tier when `stored_tokens` of it were run."""
        stored = stored_tokens - stored_tokens % self.chunk_tokens
        limit = prompt_tokens - max(1, self.window)
        return max(0, min(stored, limit - limit % self.block_size))

    def shortest_reloadable(self) -> int:
        """Tokens of the shortest prompt of which anything is reloaded."""
        return max(self.chunk_tokens, max(1, self.window) + self.block_size)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        ensure_kv_transfer_shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()

    def _generate(
        self, requests: Sequence[Request | OpenRequest], sampling: Sequence[Any]
    ) -> list[Any]:
        prompts = [
            {"prompt_token_ids": request.prompt, "cache_salt": request.salt} for request in requests
        ]
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        self._drain()
        return list(outputs)

    def _drain(self) -> None:
        """Step until running stores are reported, as a server's loop does by itself."""
        core = self._llm.llm_engine.engine_core.engine_core
        connector = core.scheduler.connector
        for _ in range(DRAIN_STEPS):
            if not connector.has_pending_push_work():
                return
            self._llm.llm_engine.step()
        raise RuntimeError("stores did not finish")


@contextlib.contextmanager
def replay_engine(
    model: str, method: Method, chunk_tokens: int, options: dict[str, Any]
) -> Iterator[ReplayEngine]:
    """A `ReplayEngine` that is closed in the end."""
    engine = ReplayEngine(model, method, chunk_tokens, options)
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory for score files."""
    with tempfile.TemporaryDirectory(prefix="kvtc-eval-") as directory:
        yield Path(directory)
