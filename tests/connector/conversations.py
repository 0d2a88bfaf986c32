"""A process that serves conversations, until it is killed or once.

    python -m tests.connector.conversations MODEL DIRECTORY RESULTS {first|resume} [CHANGES]

first: both turns, then new prompts for ever, so that a kill hits running stores. resume: the
second turn alone, on the answers of the first. RESULTS becomes JSON when both are known. CHANGES:
of the connector's configuration, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.connector import engine as engines

COUNT, TOKENS, ANSWER = 3, 640, 12
CHUNKS = COUNT * 5


def extra(directory: str, changes: str = "{}") -> dict[str, Any]:
    return {
        "codec": "kvtc",
        "ratio": 8,
        "memory_bytes": "64MiB",
        "disk_path": directory,
        "disk_min_free": 0,
        "load_gate": False,
        "encode_share": 1.0,
        "load_deadline": 60,
        **json.loads(changes),
    }


def ask(llm: Any, prompts: list[list[int]], tokens: int, store: bool) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"kvtc_store": store}},
        ),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_turn(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    answers = ask(llm, prompts, ANSWER, store=True)
    while engines.metrics(llm).get("kvtc_disk_written_chunks", 0) < CHUNKS:
        ask(llm, [prompts[0][:8]], 1, store=False)  # steps, in which workers report
    llm.reset_prefix_cache()
    return answers


def second_turn(llm: Any, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    """Nothing of it is stored, so that every run loads the same."""
    turns = [p + a + p[:40] for p, a in zip(prompts, answers, strict=True)]
    return {"answers": ask(llm, turns, ANSWER, store=False), "metrics": engines.metrics(llm)}


def main(model: Path, directory: str, results: Path, how: str, changes: str = "{}") -> None:
    prompts = engines.texts(model, count=COUNT, tokens=TOKENS)
    with engines.engine(model, extra(directory, changes), num_gpu_blocks_override=256) as llm:
        if how == "resume":
            known = json.loads(results.read_text())
            known["resumed"] = second_turn(llm, prompts, known["first"])
            publish(results, known)
            return
        answers = first_turn(llm, prompts)
        publish(results, {"first": answers, "uninterrupted": second_turn(llm, prompts, answers)})
        number = 0
        while True:
            number += 1
            ask(llm, [[number % 1000 + 1, *p[1:]] for p in prompts], 1, store=True)


def publish(results: Path, known: dict[str, Any]) -> None:
    part = results.with_suffix(".part")
    part.write_text(json.dumps(known))
    part.rename(results)


if __name__ == "__main__":
    # As in production: front end, engine core and worker are processes of their own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
