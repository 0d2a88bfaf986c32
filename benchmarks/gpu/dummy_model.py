"""A Llama of any size without weight files, and an artifact that fits it: for speed, not quality.

vLLM makes weights up (`load_format=dummy`). Its own are so small that every token has nearly the
same KV, which would compress absurdly well, so `spread_weights` draws them again at the scale of a
trained model. KV of such a model is about normal and has no redundancy for a basis to find: an
artifact fitted to it would be refused by the reconstruction gate. So none is fitted. Bases are
orthonormal cosines, means zero, plans are those of `models.greedy_plan`, for codec 2 of
`step_plans.flat_step_plan`; the errors on the card are those that these plans have on normal rows,
near 1. Time of every stage is that of a real artifact with the same plan. Bytes of version 1 are
somewhat fewer: normal values in large groups of two bits leave DEFLATE more than a trained model's
do. The words that the model says mean nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import nn

from benchmarks.gpu.models import SPECTRUM, Shape, synthetic_artifact
from benchmarks.gpu.random_model import ModelShape
from benchmarks.gpu.step_plans import flat_step_plan
from kvtc_vllm.artifact.card import UNNAMED_CODEC, ArtifactCard, DataCard, save_card
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.rank_file import PROBE_TOKENS, Probe, rank_file_name, write_rank_file
from kvtc_vllm.calibration.writing import section_cards
from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis
from kvtc_vllm.codec.bitplan import apply_plan
from kvtc_vllm.codec.payload import BitPlan
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.v2.plan import StepPlan

SMALL = ModelShape(4, 256, 4, 2, 64, 512, 1024)
"""For dry runs; the smallest head that vLLM's attention kernels all take."""


def write_model(directory: Path, shape: ModelShape, max_positions: int) -> Path:
    """Write config.json of a Llama of this shape; `models.rope_table` is its RoPE."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        # Transformers 4 reads the first, 5 the second.
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


def write_artifact(
    directory: Path,
    model: Path,
    shape: ModelShape,
    max_positions: int,
    ratios: tuple[float, ...],
    layers_per_group: int,
    codec: str = "kvtc",
) -> Path:
    """Write an artifact for the model that `write_model` left in `model`; returns `directory`.

    layers_per_group: 0 means all layers together. codec: K and V of a layer group share a basis
    where the codec has such bases.
    """
    directory.mkdir(parents=True, exist_ok=True)
    artifact = _artifact(shape, max_positions, ratios, layers_per_group, codec)
    path = directory / rank_file_name(0, 1)
    drawn = torch.Generator().manual_seed(0)
    rows = (PROBE_TOKENS, shape.layers, shape.kv_heads, shape.head_size)
    probe = Probe(
        k=torch.randn(rows, generator=drawn).half(),
        v=torch.randn(rows, generator=drawn).half(),
        positions=torch.arange(PROBE_TOKENS, dtype=torch.int32),
    )
    write_rank_file(path, artifact, probe, 0, 1)
    save_card(directory, _card(artifact, model, path))
    return directory


def spread_weights(model: nn.Module) -> None:
    """Draw the weights of a loaded model anew: norms 1, matrices so that variance is kept."""
    drawn: dict[torch.device, torch.Generator] = {}
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        device = parameter.device
        generator = drawn.setdefault(device, torch.Generator(device).manual_seed(0))
        parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)


def _artifact(
    shape: ModelShape,
    max_positions: int,
    ratios: tuple[float, ...],
    layers_per_group: int,
    codec: str,
) -> RankArtifact:
    cache = Shape(shape.layers, shape.kv_heads, shape.head_size, max_positions)
    own = layers_per_group, ratios, torch.device("cpu"), codec, codec == "kvtc2"
    made = synthetic_artifact(cache, *own)
    sections = {key: _measured(section) for key, section in made.sections.items()}
    fingerprint = artifact_fingerprint(made.geometry, sections, made.sink_tokens, made.sink_rule)
    return replace(made, sections=sections, fingerprint=fingerprint)


def _measured(section: SectionBasis) -> SectionBasis:
    """The same basis with mean zero, and the errors of its plans."""
    size = len(section.mean)
    flat = {ratio: _flat(size, ratio, plan) for ratio, plan in section.plans.items()}
    errors = {ratio: _error(size, plan) for ratio, plan in flat.items()}
    plans = {ratio: _with_error(plan, errors[ratio]) for ratio, plan in flat.items()}
    return SectionBasis(torch.zeros(size), section.basis, plans, heldout_error=errors)


def _flat(size: int, ratio: float, plan: SectionCoder) -> BitPlan | StepPlan:
    """A plan for rows whose coefficients are all alike. Steps for others would fit them badly:
    most would be escapes, and bytes and time those of data unlike any calibration."""
    if isinstance(plan, StepPlan):
        return flat_step_plan(size, ratio, SPECTRUM)
    assert isinstance(plan, BitPlan)
    return plan


def _with_error(plan: BitPlan | StepPlan, error: float) -> SectionCoder:
    if isinstance(plan, StepPlan):
        return replace(plan, expected_error=error)
    return replace(plan, predicted_error=error)


@lru_cache(maxsize=64)
def _error(size: int, plan: BitPlan | StepPlan) -> float:
    """Relative squared error of a plan on normal rows, whose coefficients are normal too."""
    rows = torch.randn(PROBE_TOKENS, size, generator=torch.Generator().manual_seed(1))
    if isinstance(plan, StepPlan):
        restored = torch.zeros_like(rows)
        restored[:, : plan.rank] = plan.restore(plan.quantise(rows))
    else:
        restored = apply_plan(rows, plan)
    return float((rows - restored).square().sum() / rows.square().sum())


def _card(artifact: RankArtifact, model: Path, path: Path) -> ArtifactCard:
    identity = model_identity(model)
    return ArtifactCard(
        model_name=model.name,
        identity=identity.identity,
        config_fingerprint=identity.config,
        weights_fingerprint=identity.weights,
        tp_size=1,
        fingerprints=(artifact.fingerprint.hex(),),
        rope_fingerprints=tuple(rope.fingerprint().hex() for rope in artifact.ropes),
        kv_dtype="bfloat16",
        geometry=artifact.geometry,
        sink_tokens=artifact.sink_tokens,
        data=DataCard(files=(), tokens=0, train_tokens=0, heldout_tokens=PROBE_TOKENS, seed=0),
        ratios=artifact.ratios(),
        sections=tuple(section_cards(0, artifact)),
        size_bytes={path.name: path.stat().st_size},
        checksums={path.name: xxhash.xxh3_128_hexdigest(path.read_bytes())},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={},
        method="synthetic",
        seconds=0.0,
        codec=msgspec.UNSET if artifact.codec == UNNAMED_CODEC else artifact.codec,
    )
