"""LoRA adapters whose files change while they are served: what the worker loaded decides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import drain, engine
from tests.reliability.live.conftest import ANSWER, Tokens
from tests.reliability.live.models import ADAPTER, adapter, push
from tests.reliability.live.stepping import count, raw, settings

pytestmark = pytest.mark.vllm

OPTIONS: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
SHOWN = 2
LOADED = SHOWN * 608


def request(path: Path, number: int = 1, name: str = "tuned", **changes: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path), **changes)


def ask(llm: Any, prompts: Tokens, lora: Any) -> Tokens:
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        settings(ANSWER),
        lora_request=lora,
        use_tqdm=False,
    )
    drain(llm)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reloaded(llm: Any, prompts: Tokens, lora: Any) -> tuple[Tokens, float]:
    """Answers when the tier is all there is, and the tokens that it gave."""
    llm.reset_prefix_cache()
    already = count(llm, "loaded_tokens")
    answers = ask(llm, prompts, lora)
    return answers, count(llm, "loaded_tokens") - already


@pytest.fixture(scope="module")
def shown(prompts: Tokens) -> Tokens:
    return prompts[:SHOWN]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapters") / "old", seed=1)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapters") / "new", seed=2)


@pytest.fixture(scope="module")
def expected(reference_model: Path, shown: Tokens, old: Path, new: Path) -> dict[str, Tokens]:
    """What vLLM alone says with either adapter, and with none."""
    with engine(reference_model, None, **OPTIONS) as llm:
        found = {
            "none": ask(llm, shown, None),
            "old": ask(llm, shown, request(old, 1, "old")),
            "new": ask(llm, shown, request(new, 2, "new")),
        }
    for number in range(SHOWN):
        assert len({tuple(answers[number]) for answers in found.values()}) == 3
    return found


@pytest.fixture
def served(old: Path, tmp_path: Path) -> Path:
    """The directory from which engines load; holds the old adapter."""
    return shutil.copytree(old, tmp_path / "served")


def test_an_adapter_is_found_again_after_a_restart(
    reference_model: Path, shown: Tokens, served: Path, expected: dict[str, Tokens], tmp_path: Path
) -> None:
    """And the model without it shares nothing with it."""
    disk = tmp_path / "tier"
    with engine(reference_model, raw(disk), **OPTIONS) as llm:
        assert ask(llm, shown, request(served)) == expected["old"]
        assert ask(llm, shown, None) == expected["none"]
        assert count(llm, "loaded_tokens") == 0
    with engine(reference_model, raw(disk), **OPTIONS) as llm:
        assert ask(llm, shown, None) == expected["none"]
        assert count(llm, "loaded_tokens") == LOADED
        assert reloaded(llm, shown, request(served)) == (expected["old"], LOADED)


def test_files_that_are_pushed_while_the_old_adapter_is_served_wait_for_their_load(
    reference_model: Path,
    shown: Tokens,
    served: Path,
    old: Path,
    new: Path,
    expected: dict[str, Tokens],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "tier"
    with engine(reference_model, raw(disk), **OPTIONS) as llm:
        assert ask(llm, shown, request(served)) == expected["old"]
        push(new, served, ADAPTER)
        # Still the old one, whatever the files say: it hits what it stored.
        assert reloaded(llm, shown, request(served)) == (expected["old"], LOADED)
        llm.llm_engine.add_lora(request(served, load_inplace=True))
        assert reloaded(llm, shown, request(served)) == (expected["new"], 0)
        assert reloaded(llm, shown, request(served)) == (expected["new"], LOADED)
    for files, answers in ((old, expected["old"]), (new, expected["new"])):
        push(files, served, ADAPTER)
        with engine(reference_model, raw(disk), **OPTIONS) as llm:
            assert ask(llm, shown, request(served)) == answers
            assert count(llm, "loaded_tokens") == LOADED


@pytest.mark.parametrize("overwrite", [False, True], ids=["renamed", "overwritten"])
def test_files_that_are_pushed_before_anything_was_stored_wait_for_their_load(
    reference_model: Path,
    shown: Tokens,
    served: Path,
    new: Path,
    expected: dict[str, Tokens],
    overwrite: bool,
) -> None:
    """The old adapter's KV must not be stored as the new one's.

    vLLM's own copy in host memory is a map of the file: overwritten, it is the new adapter, while
    the one in its slot, which computes, is the old.
    """
    with engine(reference_model, raw(), **OPTIONS) as llm:
        llm.llm_engine.add_lora(request(served))
        push(new, served, ADAPTER, overwrite=overwrite)
        assert ask(llm, shown, request(served)) == expected["old"]
        llm.llm_engine.add_lora(request(served, load_inplace=True))
        assert reloaded(llm, shown, request(served)) == (expected["new"], 0)


def test_an_adapter_with_the_size_and_time_of_the_old_one_is_another(
    reference_model: Path,
    shown: Tokens,
    served: Path,
    new: Path,
    expected: dict[str, Tokens],
    tmp_path: Path,
) -> None:
    disk = tmp_path / "tier"
    with engine(reference_model, raw(disk), **OPTIONS) as llm:
        assert ask(llm, shown, request(served)) == expected["old"]
        push(new, served, ADAPTER, keep_times=True)
        llm.llm_engine.add_lora(request(served, load_inplace=True))
        assert reloaded(llm, shown, request(served)) == (expected["new"], 0)
    with engine(reference_model, raw(disk), **OPTIONS) as llm:
        assert ask(llm, shown, request(served)) == expected["new"]
        assert count(llm, "loaded_tokens") == LOADED
