"""What differs between architectures: names and values of tensors, config.json, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.models.architectures import gemma3, llama
from benchmarks.models.gguf_file import GgufFile


@dataclass(frozen=True)
class Architecture:
    """How GGUF files of one architecture are read.

    weights: tensors in bfloat16 by the names that transformers gives them. config: content of
    config.json, from the file and those tensors. All raise `ModelError` for what they cannot read.
    """

    weights: Callable[[GgufFile], dict[str, torch.Tensor]]
    config: Callable[[GgufFile, dict[str, torch.Tensor]], dict[str, Any]]
    tokenizer: Callable[[GgufFile], Tokenizer]


ARCHITECTURES = {
    "llama": Architecture(llama.weights, llama.config, llama.tokenizer),
    "gemma3": Architecture(gemma3.weights, gemma3.config, gemma3.tokenizer),
}
