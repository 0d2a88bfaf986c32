"""What reloading does to a trained model with recurrent states, or with latents.

    python -m benchmarks.state_quality MODEL --artifact plain --artifact weighted=weighted --out DIR

Through `kvtc eval`'s two passes, with what it has no names for: states rounded to bfloat16, and
zeros in the place of states, which show how much the model needs them. Every state at a place where
a request may go on is in the real ratio. The model is one of tests/reference_model/distil.py.
`--exactness` compares greedy answers and log-probabilities of raw reloads with vLLM's own prefix
cache instead, in float32, and writes exactness.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtc_vllm.evaluation.methods import Method, find

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TASKS = "prose:1280,code:1280,litm:1280,needle:1280,variable-tracking:1280"
ZEROED = "raw, states zeroed"


def plan(names: Sequence[str], artifacts: dict[str, str], rounded: Sequence[str]) -> list[Method]:
    """Methods by name, and those of `rounded` with states rounded as well."""
    methods = [
        replace(find("raw"), name=ZEROED) if name == ZEROED else find(name, artifacts)
        for name in names
    ]
    for name in rounded:
        method = find(name, artifacts)
        options = {"state_codec": "bf16"}
        methods.append(replace(method, name=f"{method.name}, states bf16", connector=options))
    return methods


@contextlib.contextmanager
def zeroed_states(method: Method) -> Iterator[None]:
    """Load zeros in the place of states, if that is the method."""
    from kvtc_vllm.connector.state_transfer import StateTransfer

    fill = StateTransfer._fill

    def no_state(self: Any, block_ids: Any, pages: Any) -> None:
        fill(self, block_ids, pages * 0)

    with pytest.MonkeyPatch.context() as patch:
        if method.name == ZEROED:
            patch.setattr(StateTransfer, "_fill", no_state)
        yield


def measure(args: argparse.Namespace) -> None:
    """Every method on every task; results.json holds what has been measured so far."""
    from transformers import AutoTokenizer

    from kvtc_vllm.evaluation.job import Job, Workload
    from kvtc_vllm.evaluation.processes.run_method import run
    from kvtc_vllm.evaluation.processes.suite import describe
    from kvtc_vllm.evaluation.reporting import report
    from kvtc_vllm.evaluation.reporting.results import Row, exact_rows, rows

    artifacts = dict(text.split("=", 1) if "=" in text else ("", text) for text in args.artifact)
    command = (
        f"python -m benchmarks.state_quality {args.model.name} --methods '{args.methods}' "
        f"--rounded '{args.rounded}' --tasks {args.tasks} --count {args.count} "
        f"--window {args.window} --engine '{args.engine}'"
    )
    about = describe(str(args.model), command, 0)
    workloads = [
        Workload(task=name, context=int(length), count=args.count)
        for name, length in (task.split(":") for task in args.tasks.split(","))
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found: list[Row] = []
    rounded = [name for name in args.rounded.split(";") if name]
    for method in plan(args.methods.split(";"), artifacts, rounded):
        job = Job(
            model=str(args.model),
            method=replace(method, window=args.window),
            workloads=workloads,
            seed=0,
            source=None,
            engine=json.loads(args.engine),
            out="",
        )
        with zeroed_states(method):
            outcome = run(job, tokenizer)
        if not found:
            found += exact_rows(outcome)
        found += rows(outcome)
        report.write_rows(args.out, about, found)
    report.write(args.out, about, found)


def exactness(args: argparse.Namespace) -> None:
    """Greedy answers of a prefix hit, of raw reloads, and of reloads of zeros by cache group.

    Where vLLM has no prefix cache for the model, what is computed from nothing takes its place.
    """
    from tests.connector.engine import metrics
    from tests.hybrid.running import RAW, ask, cache_groups, difference, loading_zeros, start

    engine = {"dtype": "float32", **json.loads(args.engine)}
    with start(args.model, RAW, **engine) as llm:
        texts = _prompts(args.model, args.count)

        def each(load: bool = True) -> list[Any]:
            # One by one: batches of another size round differently.
            return [answer for ids in texts for answer in ask(llm, [ids], 32, load)]

        def compared(answers: list[Any]) -> dict[str, Any]:
            first = max(
                difference(
                    [a._replace(tokens=[], logprobs=a.logprobs[:1])],
                    [b._replace(tokens=[], logprobs=b.logprobs[:1])],
                )
                for a, b in zip(answers, base, strict=True)
            )
            changed = sum(a.tokens != b.tokens for a, b in zip(answers, base, strict=True))
            return {"first_token_logprobs_differ_by": first, "answers_changed": changed}

        computed = each()
        base = computed
        hit = each(load=False)
        cached = metrics(llm).get("prefix_cache_hits", 0) > 0
        base = hit if cached else computed
        found: dict[str, Any] = {"computed from nothing": compared(computed)}
        assert llm.reset_prefix_cache()
        before = metrics(llm).get("kvtc_hit_tokens", 0)
        found["raw reload"] = compared(each())
        tokens = metrics(llm)["kvtc_hit_tokens"] - before
        for group in range(cache_groups(llm)):
            assert llm.reset_prefix_cache()
            with loading_zeros(group):
                found[f"zeros for cache group {group}"] = compared(each())
    result = {
        "command": f"python -m benchmarks.state_quality {args.model.name} --exactness "
        f"--count {args.count} --engine '{args.engine}'",
        "baseline": "vLLM's prefix cache" if cached else "computed from nothing",
        "answers": len(texts),
        "prompt_tokens": sum(map(len, texts)),
        "reloaded_tokens": int(tokens),
        "results": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    (args.out / "exactness.json").write_text(text)
    print(text)


def _prompts(model: Path, count: int) -> list[list[int]]:
    """Held-out prose of about 650 tokens, of the Python installation."""
    from transformers import AutoTokenizer

    from kvtc_vllm.evaluation.data.corpus import prose_documents

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = (tokenizer(text).input_ids[:650] for text in prose_documents("eval"))
    return [prompt for prompt in ids if len(prompt) == 650][:count]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--artifact", action="append", default=[], metavar="[NAME=]DIR")
    parser.add_argument("--methods", default=f"raw;{ZEROED};kvtc-8x;kvtc-16x", help="; between")
    parser.add_argument("--rounded", default="raw;kvtc-16x", help="also with states in bfloat16")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--engine", default="{}", help="JSON of further vllm.LLM arguments")
    parser.add_argument("--window", type=int, default=128, help="recent window in tokens")
    parser.add_argument("--exactness", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if args.exactness:
        exactness(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
