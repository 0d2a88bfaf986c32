"""Variants of the reference model and adapters for it, made in a second."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
RANK = 8
LAYERS, HIDDEN = 8, 256
PROJECTIONS = {"q_proj": 256, "k_proj": 128, "v_proj": 128}


def updated_model(model: Path, directory: Path, seed: int = 1, amount: float = 0.2) -> Path:
    """The model after more training, so to speak: every weight moved by some of itself."""
    shutil.copytree(model, directory)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (weight * (1 + amount * torch.randn(weight.shape, generator=generator))).to(
            weight.dtype
        )
        for name, weight in load_file(model / WEIGHTS).items()
    }
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


def with_settings(model: Path, directory: Path, **settings: object) -> Path:
    """A directory with nothing but the model's config.json, some settings changed."""
    directory.mkdir()
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **settings}))
    return directory


def adapter(directory: Path, seed: int) -> Path:
    """A LoRA adapter that changes what the reference model says."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, size in PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, HIDDEN, generator=generator) / HIDDEN**0.5
            up = torch.randn(size, RANK, generator=generator) / RANK**0.5
            tensors[f"{prefix}.lora_A.weight"] = down
            tensors[f"{prefix}.lora_B.weight"] = up
    save_file(tensors, directory / ADAPTER, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "reference",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def push(
    source: Path, target: Path, name: str, keep_times: bool = False, overwrite: bool = False
) -> None:
    """Put a file of `source` in the place of the one in `target`.

    keep_times: so that neither size nor time of change tells. overwrite: into the same file, so
    that who has mapped it sees the new contents, instead of a new file in its place.
    """
    before = (target / name).stat()
    written = target / name if overwrite else target / f"{name}.new"
    shutil.copyfile(source / name, written)
    if keep_times:
        os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
    written.replace(target / name)
    after = (target / name).stat()
    same = (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert same == keep_times
    assert (after.st_ino == before.st_ino) == overwrite


def theta_override(theta: float) -> Callable[[Any], Any]:
    """A function for `hf_overrides`; all that it returns have one name."""

    def override(config: Any) -> Any:
        # vLLM tries it on an empty configuration first.
        parameters = getattr(config, "rope_parameters", None)
        if parameters is not None:
            config.rope_parameters = {**parameters, "rope_theta": theta}
        return config

    return override
