"""Teacher-forced scoring inside the engine: a vLLM logits processor and its files.

Prompt log-probabilities can't be used: vLLM computes a prompt whose log-probabilities
are asked for without its prefix cache. So the target is *generated*: at each step the
processor records what the model thinks and then leaves only the target token possible.

It runs in the process of the first worker rank; requests say through `extra_args`
where results go, so that it works however the engine is spread over processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from kvtc_vllm.evaluation.scores import REFERENCE_TOKENS, Floats, divergence

ARGUMENT = "kvtc_scoring"
PROCESSOR = "kvtc_vllm.evaluation.replay.scoring:ForcedScoring"


def forced(
    target: list[int], result: Path, *, reference: Path | None = None, exact: bool = False
) -> SamplingParams:
    """Sampling parameters that generate exactly `target` and write scores to `result`.

    exact: also keep the distributions, for later runs that name `result` as `reference`.
    """
    argument = {
        "target": target,
        "result": str(result),
        "reference": None if reference is None else str(reference),
        "exact": exact,
    }
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(target),
        ignore_eos=True,
        detokenize=False,
        extra_args={ARGUMENT: argument},
    )


class ForcedScoring(AdapterLogitsProcessor):
    """Applies to requests made by `forced` only."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        # By result: a preempted request gets a new state, but goes on where it was.
        self._runs: dict[str, _Run] = {}

    def is_argmax_invariant(self) -> bool:
        """False: the processor decides which token comes."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """The recorder of one request, or None for ordinary requests."""
        argument = (params.extra_args or {}).get(ARGUMENT)
        if argument is None:
            return None
        run = self._runs.setdefault(argument["result"], _Run(argument))

        def step(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            # Prompts computed in pieces call this for each piece; the last call counts.
            position = len(output_ids)
            if position >= len(run.target):
                return logits
            run.record(position, logits)
            if position == len(run.target) - 1:
                run.write()
                self._runs.pop(argument["result"], None)
            only = torch.full_like(logits, float("-inf"))
            only[run.target[position]] = 0.0
            return only

        return step


class _Run:
    """Rows of one request so far."""

    def __init__(self, argument: dict[str, Any]) -> None:
        self.target: list[int] = argument["target"]
        self._result = Path(argument["result"])
        self._exact = bool(argument["exact"])
        length = len(self.target)
        self._nll = np.zeros(length, np.float32)
        self._top = np.zeros(length, np.int64)
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._reference: dict[str, np.ndarray] | None = None
        self._kl: Floats | None = None
        if argument["reference"] is not None:
            with np.load(argument["reference"]) as file:
                self._reference = {name: file[name] for name in ("ids", "log_probs")}
            self._kl = np.zeros(length, np.float32)

    def record(self, position: int, logits: torch.Tensor) -> None:
        """Note the distribution of one target position. logits: [vocabulary]."""
        log_probs = logits.double().log_softmax(-1)
        self._nll[position] = -float(log_probs[self.target[position]])
        self._top[position] = int(log_probs.argmax())
        if self._exact:
            best = log_probs.topk(min(REFERENCE_TOKENS, len(log_probs)))
            self._kept[position] = (best.indices.cpu().numpy(), best.values.cpu().numpy())
        if self._reference is not None and self._kl is not None:
            ids = torch.from_numpy(self._reference["ids"][position]).to(log_probs.device)
            exact = torch.from_numpy(self._reference["log_probs"][position]).to(log_probs)
            self._kl[position] = divergence(exact, log_probs[ids])

    def write(self) -> None:
        """Write the file that `Scores.load` reads."""
        arrays: dict[str, Any] = {"nll": self._nll, "top": self._top}
        if self._kl is not None:
            arrays["kl"] = self._kl
        if self._exact:
            rows = [self._kept[i] for i in range(len(self.target))]
            arrays["ids"] = np.stack([ids for ids, _ in rows])
            arrays["log_probs"] = np.stack([values for _, values in rows])
        np.savez(self._result, **arrays)
