"""The bench sees damage: codecs broken on purpose fail every task, a sound one passes them all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.rank_file import rank_file_name
from kvtc_vllm.codec.base import Coder, DecodedChunk
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.evaluation.job import SharedJob, Workload
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes import run_shared
from kvtc_vllm.evaluation.replay import variants
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.evaluation.reporting.results import damaged, rows
from kvtc_vllm.evaluation.tasks import TASKS

pytestmark = pytest.mark.vllm

LONG = ("multi-turn", "needle")
"""Chats need the room; and a needle is found by content, whose keys turn little in 500 tokens."""
WORKLOADS = [
    Workload(task=task, context=1280 if task in LONG else 512, count=6 if task in LONG else 10)
    for task in TASKS
]


Damage = Callable[[KvtcCodec, DecodedChunk], DecodedChunk]


class Broken(Coder):
    """Encodes as it should; `damage` is done to what is decoded."""

    def __init__(self, sound: KvtcCodec, damage: Damage) -> None:
        self._sound = sound
        self._damage = damage

    def encode(self, *arguments: Any) -> bytes:
        return self._sound.encode(*arguments)

    def decode(self, *arguments: Any, **named: Any) -> DecodedChunk:
        return self._damage(self._sound, self._sound.decode(*arguments, **named))


def broken(damage: Damage, base: variants.VariantContext) -> Broken:
    """Our codec with the damage; a row of `VARIANTS` once the damage is given."""
    codec = base.codec()
    assert isinstance(codec, KvtcCodec)
    return Broken(codec, damage)


def wrong_rope_sign(codec: KvtcCodec, chunk: DecodedChunk) -> DecodedChunk:
    """Keys rotated backwards: twice undone is the rotation by the negative angle."""
    rope = codec.artifact.ropes[0]
    positions = torch.arange(chunk.start, chunk.start + len(chunk.k))
    k = rope.invert(rope.invert(chunk.k, positions), positions)
    return replace(chunk, k=k.to(chunk.k.dtype))


def shuffled_basis(codec: KvtcCodec, chunk: DecodedChunk) -> DecodedChunk:
    """Decoding with the columns of every basis in another order: a linear map of the rows."""
    artifact = codec.artifact
    sections = {}
    for key, section in artifact.sections.items():
        order = torch.randperm(section.basis.shape[1], generator=torch.Generator().manual_seed(0))
        sections[key] = replace(section, basis=section.basis[:, order].contiguous())
    other = KvtcCodec(replace(artifact, sections=sections), codec.ratio, codec.dtype)
    return other.decode(codec.encode(chunk.k, chunk.v, chunk.start))


def zeroed_values(codec: KvtcCodec, chunk: DecodedChunk) -> DecodedChunk:
    """Keys right, values gone."""
    return replace(chunk, v=torch.zeros_like(chunk.v))


def sound(codec: KvtcCodec, chunk: DecodedChunk) -> DecodedChunk:
    """As it was decoded."""
    return chunk


DAMAGES = (wrong_rope_sign, shuffled_basis, zeroed_values)


@pytest.fixture(scope="module")
def damaged_tasks(reference_model: Path) -> dict[str, set[str]]:
    """Names of the tasks that count as damaged, for each codec; over one exact pass for all."""
    from transformers import AutoTokenizer

    model = str(reference_model)
    directory = registry.find(model_identity(model), 1, 8.0, model_name="reference")
    artifact = str(directory / rank_file_name(0, 1))
    # A short window leaves less to exact recomputation, so that less data tells.
    methods = [
        Method(
            damage.__name__,
            "8x",
            override={"variant": damage.__name__, "artifact": artifact, "ratio": 8.0},
            window=32,
        )
        for damage in (sound, *DAMAGES)
    ]
    job = SharedJob(
        model=model,
        methods=methods,
        workloads=WORKLOADS,
        seed=1,
        source=None,
        # Damage tells in any element type; a CPU without AVX-512 is many times slower in bfloat16.
        engine={"block_size": 32, "dtype": "float32"},
        out="",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        for damage in (sound, *DAMAGES):
            patch.setitem(variants.VARIANTS, damage.__name__, partial(broken, damage))
        *_, outcomes = run_shared.run(job, AutoTokenizer.from_pretrained(model))
    TURN.begin(None)
    found = {}
    for outcome in outcomes:
        assert not outcome.skipped
        of_one = rows(outcome)
        for row in of_one:
            if not row.label and row.metric in ("kl", "nll_change", "accuracy_change"):
                print(row.method, row.task, row.metric, f"{row.value:.3f}", row.ci95)
        found[outcome.method.name] = {task for task, _ in damaged(of_one)}
    return found


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_codec_fails_every_task(
    damaged_tasks: dict[str, set[str]], damage: Damage
) -> None:
    assert damaged_tasks[damage.__name__] == set(TASKS)


def test_a_sound_codec_passes_every_task(damaged_tasks: dict[str, set[str]]) -> None:
    assert damaged_tasks[sound.__name__] == set()
