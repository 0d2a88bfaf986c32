"""A GGUF file as a Hugging Face directory in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.models.architectures import ARCHITECTURES
from benchmarks.models.errors import ModelError
from benchmarks.models.gguf_file import GgufFile
from benchmarks.models.tokenizer import special_ids, tokenizer_config


def convert(gguf: Path, directory: Path) -> None:
    """Writes weights, configuration and tokenizer of `gguf` into `directory`, which exists.

    Raises `ModelError` for what cannot be converted; OSError and `SafetensorError` where files
    cannot be written.
    """
    file = GgufFile(gguf)
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        raise ModelError(
            f"{gguf.name}: general.architecture is {file.architecture!r}; "
            f"only {', '.join(ARCHITECTURES)} can be converted"
        )
    tensors = architecture.weights(file)
    architecture.tokenizer(file).save(str(directory / "tokenizer.json"))
    _write(directory / "config.json", architecture.config(file, tensors))
    _write(directory / "tokenizer_config.json", tokenizer_config(file))
    _write(directory / "generation_config.json", special_ids(file))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    path = directory / "model.safetensors"
    save_file(contiguous, path, metadata={"format": "pt"})
    # safetensors leaves it to the owner alone; who may read the rest may read the weights.
    path.chmod((directory / "config.json").stat().st_mode)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
