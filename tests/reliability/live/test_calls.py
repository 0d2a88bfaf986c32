"""What vLLM's calls do to the tiers: the table in docs/changing.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.stepping import chunk_files, count, raw, wait_for

pytestmark = pytest.mark.vllm

EXACT = 608
"""Of 640 tokens: all blocks but the last, whose logits are needed."""


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def sleep(level: int) -> Callable[[Any], None]:
    def call(llm: Any) -> None:
        core(llm).sleep(level)
        core(llm).wake_up(["scheduling"] if level == 0 else None)

    return call


def pause(clear_cache: bool) -> Callable[[Any], None]:
    def call(llm: Any) -> None:
        core(llm).pause_scheduler(mode="abort", clear_cache=clear_cache)
        core(llm).resume_scheduler()

    return call


CALLS: dict[str, tuple[Callable[[Any], object], bool]] = {
    "reset_prefix_cache()": (lambda llm: llm.reset_prefix_cache(), True),
    "reset_prefix_cache(reset_connector=True)": (
        lambda llm: llm.reset_prefix_cache(reset_connector=True),
        False,
    ),
    "sleep(0)": (sleep(0), True),
    "sleep(1)": (sleep(1), False),
    "sleep(2)": (sleep(2), False),
    "pause(clear_cache=False)": (pause(False), True),
    "pause(clear_cache=True)": (pause(True), False),
}
"""Call -> how it is made, and whether the tiers are kept."""


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tier")


@pytest.fixture(scope="module")
def llm(reference_model: Path, tier: Path, plain: Callable[..., Tokens]) -> Iterator[Any]:
    """One engine for all calls; plain: a process has one engine at a time."""
    plain(reference_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "0")
        with engine(reference_model, raw(tier)) as made:
            yield made


@pytest.mark.parametrize("call", CALLS)
def test_a_call_keeps_the_tiers_or_starts_a_generation(
    llm: Any, tier: Path, prompts: Tokens, before: Tokens, call: str
) -> None:
    make, kept = CALLS[call]
    number = list(CALLS).index(call) % len(prompts)
    prompt, expected = prompts[number : number + 1], before[number : number + 1]
    assert llm.reset_prefix_cache(reset_connector=True)
    written = count(llm, "disk_written_chunks")
    assert greedy(llm, prompt, ANSWER) == expected
    wait_for(llm, "disk_written_chunks", written + 5)
    files = chunk_files(tier)
    make(llm)
    assert llm.reset_prefix_cache()
    already = count(llm, "loaded_tokens")
    assert greedy(llm, prompt, ANSWER) == expected
    assert count(llm, "loaded_tokens") - already == (EXACT if kept else 0)
    if kept:
        assert chunk_files(tier) == files


def test_every_call_of_the_table_is_tested() -> None:
    table = (Path(__file__).parents[3] / "docs" / "changing.md").read_text()
    for call in CALLS:
        assert f"`{call}`" in table
