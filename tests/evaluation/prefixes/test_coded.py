"""Tokens that an eviction leaves, in coded chunks: what the codec is given, bytes and quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.evaluation import methods
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.job import SharedJob, Workload
from kvtc_vllm.evaluation.prefixes.coded import Coded
from kvtc_vllm.evaluation.prefixes.evicted import Evicted
from kvtc_vllm.evaluation.prefixes.runner import PrefixRunner
from kvtc_vllm.evaluation.processes.run_prefixes import run
from kvtc_vllm.evaluation.tasks.base import Example, Session
from tests.codec.synthetic import rope_table

GEOMETRY = Geometry(2, 2, 16, 16, ((0, 2),))
PREFIX, WINDOW, CHUNK = 64, 10, 16


class Recorded:
    """The bit-exact codec, with what it was given."""

    def __init__(self) -> None:
        self.codec: Any = open_codec("raw", torch.bfloat16, geometry=GEOMETRY)
        self.given: list[tuple[int, torch.Tensor]] = []
        self.size = 0

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int) -> bytes:
        self.given.append((start, k))
        blob: bytes = self.codec.encode(k, v, start)
        self.size += len(blob)
        return blob

    def decode(self, *arguments: Any) -> Any:
        return self.codec.decode(*arguments)


def coded(keep: float, codec: Any) -> Coded:
    ropes = [Rope(rope_table(16, 512, torch.float32))] * 2
    return Coded(EVICTIONS["h2o"](keep=keep), codec, ropes, CHUNK)


def test_all_tokens_through_an_exact_codec_are_the_exact_run(tiny: str, example: Example) -> None:
    codec = Recorded()
    replay = PrefixRunner(tiny, {"it": coded(1.0, codec)}).score(example, PREFIX, WINDOW)["it"]
    assert [start for start, _ in codec.given] == [0, 16, 32, 48]
    assert replay.bytes_stored == codec.size + PREFIX // 8
    # What is left is rounding to bfloat16.
    np.testing.assert_allclose(replay.reduced.nll, replay.exact.nll, atol=0.05)


def test_chunks_hold_kept_tokens_at_positions_without_gaps(tiny: str, example: Example) -> None:
    """Half of 64 tokens: chunks of 16, whose keys lose RoPE at the places 0 to 31."""
    codec, other = Recorded(), Recorded()
    runner = PrefixRunner(tiny, {"half": coded(0.5, codec), "all": coded(1.0, other)})
    replay = runner.score(example, PREFIX, WINDOW)["half"]
    assert [(start, len(k)) for start, k in codec.given] == [(0, 16), (16, 16)]
    assert replay.bytes_stored == codec.size + PREFIX // 8
    rope = Rope(rope_table(16, 512, torch.float32))
    every = torch.cat([k for _, k in other.given])
    plain = rope.invert(every, torch.arange(len(every)))
    ours = torch.cat([k for _, k in codec.given])
    found = rope.invert(ours, torch.arange(len(ours)))
    # H2O keeps the newest 16 of these 32: they are the last 16 of all.
    torch.testing.assert_close(found[16:], plain[48:], atol=0.05, rtol=0.02)


def test_one_choice_for_the_model_and_then_only_rounding(tiny: str, example: Example) -> None:
    """With TOVA of one layer and head, the choice of the model is that of its layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.25,
    )
    path = Path(tiny).parent / "single"
    LlamaForCausalLM(config).save_pretrained(path)
    geometry = Geometry(1, 1, 16, 16, ((0, 1),))
    codec: Any = open_codec("raw", torch.bfloat16, geometry=geometry)
    tova = EVICTIONS["tova"](keep=0.25)
    both = {
        "plain": Evicted(tova),
        "coded": Coded(tova, codec, [Rope(rope_table(16, 512, torch.float32))], CHUNK),
    }
    replays = PrefixRunner(str(path), both).score(example, PREFIX, WINDOW)
    plain, ours = (replays[name].reduced for name in both)
    assert plain.kl is not None
    assert plain.kl.max() > 1e-3
    np.testing.assert_allclose(ours.nll, plain.nll, atol=0.02)


def test_chats_are_coded_again_as_they_grow(tiny: str, chat: Session) -> None:
    codec = Recorded()
    runner = PrefixRunner(tiny, {"it": coded(0.5, codec)})
    replays = runner.score_session(chat, WINDOW, chunk_tokens=8)["it"]
    assert [replay.prefix_tokens for replay in replays] == [0, 40, 64]
    # 20 of 40 tokens, then 32 of 20 and 24 more.
    assert [(start, len(k)) for start, k in codec.given] == [(0, 16), (16, 4), (0, 16), (16, 16)]
    assert replays[1].bytes_stored + replays[2].bytes_stored == codec.size + 5 + 8


def test_the_process_measures_every_kind(reference_model: Path) -> None:
    """Evictions, recalls and tokens below our codec, in one job; ratios are what they must be."""
    from transformers import AutoTokenizer

    names = ("h2o", "clusterkv/tokens=20", "h2o/keep=1+kvtc-8x", "snapkv/keep=0.5+kvtc-8x")
    job = SharedJob(
        model=str(reference_model),
        methods=[methods.find(name) for name in names],
        workloads=[Workload(task="litm", context=400, count=1)],
        seed=0,
        source=None,
        engine={},
        out="",
    )
    *_, outcomes = run(job, AutoTokenizer.from_pretrained(reference_model))
    found = {outcome.method.name: outcome for outcome in outcomes}
    assert list(found) == list(names)
    sizes = {name: found[name].stored[0] for name in names}
    ratios = {name: size.raw / size.stored for name, size in sizes.items()}
    assert ratios["h2o"] == pytest.approx(8, rel=0.02)
    assert 0.9 < ratios["clusterkv/tokens=20"] < 1
    assert sizes["h2o"].read == 0
    assert 0 < sizes["clusterkv/tokens=20"].read < sizes["clusterkv/tokens=20"].stored / 2
    assert 7 < ratios["h2o/keep=1+kvtc-8x"] < 10
    assert 12 < ratios["snapkv/keep=0.5+kvtc-8x"] < 20
    assert all(size.seconds > 0 for size in sizes.values())
    assert len({size.exact_seconds for size in sizes.values()}) == 1
    assert sizes["h2o"].exact_seconds > 0
    kl = {name: found[name].records[0].kl for name in names}
    assert kl["h2o/keep=1+kvtc-8x"] < 0.05 < kl["snapkv/keep=0.5+kvtc-8x"]
