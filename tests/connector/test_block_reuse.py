"""What a configuration says of the blocks of an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import ModelConfig

from kvtc_vllm.connector.block_reuse import drafts_answers


def configuration(speculative: Any = None, **of_model: Any) -> Any:
    """With vLLM's own rule of which models diffuse, if this release has one."""
    rule = {name: vars(ModelConfig)[name] for name in ("is_diffusion",) if name in vars(ModelConfig)}
    model = type("Model", (), rule)()
    model.hf_config = SimpleNamespace(**of_model)
    return SimpleNamespace(model_config=model, speculative_config=speculative)


def test_answers_are_drafts_where_tokens_are_proposed() -> None:
    assert not drafts_answers(configuration())
    assert drafts_answers(configuration(object()))


@pytest.mark.skipif(
    not hasattr(ModelConfig, "is_diffusion"), reason="this vLLM has no diffusion models"
)
def test_answers_are_drafts_where_a_canvas_is_computed_again_and_again() -> None:
    assert drafts_answers(configuration(canvas_length=32))
