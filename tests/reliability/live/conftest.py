"""Models before and after an update, prompts, and what vLLM alone says to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.connector.engine import engine, greedy, texts
from tests.reliability.live.models import updated_model

Tokens = list[list[int]]
ANSWER = 16


@pytest.fixture(autouse=True)
def stable_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM before 0.29 needs for a disk tier."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


@pytest.fixture(scope="session")
def prompts(reference_model: Path) -> Tokens:
    """Six of five chunks each, whose continuations depend on the weights."""
    found = texts(reference_model, count=8, tokens=640)
    return found[:3] + found[5:]  # the two between are so easy that any related model agrees


@pytest.fixture(scope="session")
def updated(reference_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with other weights."""
    return updated_model(reference_model, tmp_path_factory.mktemp("models") / "updated")


@pytest.fixture(scope="session")
def plain(prompts: Tokens) -> Callable[..., Tokens]:
    """Answers of an engine without any connector to all prompts."""
    known: dict[tuple[Path, str], Tokens] = {}

    def answers(model: Path, computes: str = "default", **options: Any) -> Tokens:
        """computes: a name for what the options make of the model; asked once by that name."""
        key = (model, computes)
        if key not in known:
            with engine(model, None, **options) as llm:
                known[key] = greedy(llm, prompts, ANSWER)
        return known[key]

    return answers


@pytest.fixture
def before(reference_model: Path, plain: Callable[..., Tokens]) -> Tokens:
    """Answers of the reference model."""
    return plain(reference_model)


@pytest.fixture
def after(updated: Path, plain: Callable[..., Tokens], before: Tokens) -> Tokens:
    """Answers of the updated model, all of them others."""
    answers = plain(updated)
    assert all(a != b for a, b in zip(answers, before, strict=True))
    return answers
