"""Loading the calibrated model in transformers, for what needs its logits or its gradients.

transformers is imported when called. What it cannot do is one sentence that names the option which
asked for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvtc_vllm.codec.errors import ArtifactError


@dataclass(frozen=True)
class Asked:
    """option: that needs the model. instead: what to give where it can't be had."""

    option: str
    instead: str

    def unusable(self, directory: Path, reason: Exception | str) -> ArtifactError:
        """That it cannot be had of this model, and what to give instead."""
        text = " ".join(str(reason).split()) or type(reason).__name__
        return ArtifactError(
            f"{self.option}: transformers cannot run {directory.name} as needed ({text}); "
            f"{self.instead}"
        )


@dataclass(frozen=True)
class Loaded:
    """A model for inference, without gradients of its weights, and its tokeniser."""

    model: Any
    tokenizer: Any

    @property
    def max_positions(self) -> int:
        """Longest prompt that the configuration allows."""
        return max_positions(self.model.config)


def max_positions(config: Any) -> int:
    """Longest prompt that a model's configuration in transformers allows."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def load_model(
    directory: Path, device: str, asked: Asked, *, trust_remote_code: bool = False
) -> Loaded:
    """device: as torch names it; on a CPU arithmetic is float32, on a GPU the checkpoint's dtype.

    Raises ArtifactError if transformers cannot load it.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    where = torch.device(device)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(directory, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32 if where.type == "cpu" else "auto", **options
        )
    except Exception as error:  # whatever a model's own code raises
        raise asked.unusable(directory, error) from error
    return Loaded(model.eval().requires_grad_(False).to(where), tokenizer)


def check_supported(directory: Path, asked: Asked, *, trust_remote_code: bool = False) -> None:
    """Raise ArtifactError if transformers does not know this model. Reads its configuration only.

    To be asked before a capture, which takes long.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        known = type(config) in AutoModelForCausalLM._model_mapping
        remote = trust_remote_code and "AutoModelForCausalLM" in (
            getattr(config, "auto_map", None) or {}
        )
    except Exception as error:
        raise asked.unusable(directory, error) from error
    if not known and not remote:
        raise asked.unusable(
            directory, f"it knows no causal language model for {type(config).__name__}"
        )
