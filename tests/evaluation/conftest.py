"""A tiny random model, saved where `from_pretrained` finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvtc_vllm.evaluation.tasks.base import Example, Session

VOCABULARY = 50


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2 layers, 4 query heads on 2 KV heads of 16; weights large enough for uneven attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.25,
    )
    path: Path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def chat() -> Session:
    """Prompts of 40, 70 and 103 tokens; each begins with the one before and its answer."""
    ids = torch.randint(VOCABULARY, (109,), generator=torch.Generator().manual_seed(1)).tolist()
    ends = (40, 70, 103)
    return Session([Example(ids[:end], ids[end : end + 6], is_answer=True) for end in ends])


@pytest.fixture
def example(chat: Session) -> Example:
    """A prompt of 103 tokens with a target of 6."""
    return chat.turns[-1]
