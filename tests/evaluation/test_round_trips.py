"""Replays of several methods over one exact pass give what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.config import load_config
from kvtc_vllm.evaluation import methods
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.job import Job, Outcome, SharedJob, Workload
from kvtc_vllm.evaluation.processes import run_method, run_shared
from kvtc_vllm.evaluation.processes.carrier import alone, carrier
from kvtc_vllm.evaluation.processes.suite import CHILD, SHARED_CHILD, run_child
from kvtc_vllm.evaluation.replay.baseline_codec import BaselineCodec, FormCodec
from kvtc_vllm.evaluation.replay.round_trips import TURN, RoundTripCodec

GEOMETRY = Geometry(2, 2, 32, 32, ((0, 2),))


@pytest.fixture
def codecs() -> Iterator[tuple[RoundTripCodec, BaselineCodec]]:
    kivi = BaselineCodec(BASELINES["kivi-2bit"](GEOMETRY, torch.bfloat16, [None, None]))
    exact = open_codec("raw", torch.bfloat16, geometry=GEOMETRY)
    yield RoundTripCodec(exact, {"kivi-2bit": kivi, "raw": exact}), kivi
    TURN.begin(None)


def chunk(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(64, 2, 2, 32, generator=generator).bfloat16() for _ in range(2))
    return k, v


def test_a_load_gives_what_the_method_would_have_stored(codecs: Any) -> None:
    shared, kivi = codecs
    k, v = chunk(0)
    blob = shared.encode(k, v, 128, b"name")
    coded = kivi.encode(k, v, 128, b"name")
    alone = kivi.decode(coded, 128, 64, b"name")
    TURN.begin("kivi-2bit")
    loaded = shared.decode(blob, 128, 64, b"name")
    assert torch.equal(loaded.k, alone.k)
    assert torch.equal(loaded.v, alone.v)
    assert not torch.equal(loaded.k, k)
    assert TURN.bytes() == (k.nbytes + v.nbytes, len(coded))


@pytest.mark.parametrize("first", ["raw", "kvtc-8x", "kivi-2bit"])
def test_any_method_may_come_first(first: str, reference_model: Path, tmp_path: Path) -> None:
    chosen = [methods.find(name) for name in (first, "kvtc-16x")]
    shared = carrier(chosen, str(reference_model), tmp_path)
    extra = shared.connector_config(shared.chunk_tokens)
    assert extra.pop("evaluation")["round_trips"].keys() == {first, "kvtc-16x"}
    config = load_config(extra)
    assert (config.codec, config.ratio) == ("raw", None)


def test_before_any_turn_loads_are_exact_and_uncounted(codecs: Any) -> None:
    shared, _ = codecs
    k, v = chunk(1)
    TURN.begin(None)
    loaded = shared.decode(shared.encode(k, v, 0, b"x"), 0, 64, b"x")
    assert torch.equal(loaded.k, k)
    assert TURN.bytes() == (0, 0)


def test_a_chunk_counts_once_per_turn(codecs: Any) -> None:
    shared, _ = codecs
    k, v = chunk(2)
    blobs = {key: shared.encode(k, v, 0, key) for key in (b"x", b"y")}
    for method in ("kivi-2bit", "raw"):
        TURN.begin(method)
        for key in (b"x", b"x", b"y"):
            shared.decode(blobs[key], 0, 64, key)
        assert TURN.bytes()[0] == 2 * (k.nbytes + v.nbytes)


def test_methods_share_that_store_the_same_chunks() -> None:
    usual, narrow, whole = (
        methods.find("kvtc-16x"),
        methods.variant(methods.find("kvtc-16x"), "narrow", window=64),
        methods.find("xkv"),
    )
    assert usual.can_share(methods.find("kivi-2bit"))
    assert whole.can_share(methods.find("gear-2bit"))
    assert narrow.can_share(methods.variant(methods.find("kvtc-8x"), "narrow", window=64))
    assert not usual.can_share(narrow)
    assert not usual.can_share(whole)
    assert methods.find("h2o").can_share(methods.find("clusterkv"))
    assert not methods.find("h2o").can_share(usual)


def here(job: Job | SharedJob) -> list[Outcome]:
    """What a child process would find, in this one, which has imported vLLM already."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if isinstance(job, Job):
        return [run_method.run(job, tokenizer)]
    *_, outcomes = run_shared.run(job, tokenizer)
    TURN.begin(None)
    return outcomes


@pytest.mark.vllm
def test_shared_and_separate_passes_agree(reference_model: Path) -> None:
    """Engines of their own round alike, but batches of threads may differ: a tolerance."""
    common: dict[str, Any] = {
        "model": str(reference_model),
        "workloads": [
            Workload(task="litm", context=400, count=3),
            Workload(task="multi-turn", context=1500, count=1),
        ],
        "seed": 0,
        "source": None,
        "engine": {"block_size": 32, "max_model_len": 2048},
        "out": "",
    }
    wanted = [methods.find(name) for name in ("raw", "kvtc-16x")]
    shared = run_child(SHARED_CHILD, "shared", SharedJob(methods=wanted, **common), list[Outcome])
    (alone,) = here(Job(method=wanted[1], **common))
    raw, coded = shared
    assert max(record.kl for record in raw.records) < 0.05
    assert len(coded.records) == len(alone.records) > 5
    for together, single in zip(coded.records, alone.records, strict=True):
        assert together.reloaded_tokens == single.reloaded_tokens
        assert together.kl == pytest.approx(single.kl, rel=0.3, abs=0.02)
    assert sum(record.kl for record in coded.records) > sum(record.kl for record in raw.records)
    for together_size, single_size in zip(coded.stored, alone.stored, strict=True):
        ratio = together_size.raw / together_size.stored
        # Only chunks that were loaded count, so the exact sinks of the first weigh more.
        assert ratio == pytest.approx(single_size.raw / single_size.stored, rel=0.1)


@pytest.mark.vllm
def test_methods_that_need_whole_prompts_share_too(reference_model: Path) -> None:
    """Both tasks need chunks of their own, so engines of their own."""
    common: dict[str, Any] = {
        "model": str(reference_model),
        "workloads": [Workload(task="litm", context=length, count=2) for length in (300, 400)],
        "seed": 0,
        "source": None,
        "engine": {"block_size": 32, "max_model_len": 2048},
        "out": "",
    }
    wanted = [methods.find(name) for name in ("xkv", "gear-2bit")]
    shared = here(SharedJob(methods=wanted, **common))
    alone = run_child(CHILD, "gear-2bit", Job(method=wanted[1], **common), Outcome)
    together = shared[1]
    assert [size.context for size in together.stored] == [300, 400]
    for own, others in zip(together.stored, shared[0].stored, strict=True):
        assert own.seconds > 0
        assert own.exact_seconds == others.exact_seconds > 0
    for one, other in zip(together.records, alone.records, strict=True):
        assert one.reloaded_tokens == other.reloaded_tokens > 128
        assert one.kl == pytest.approx(other.kl, rel=0.3, abs=0.02)
    for size, single in zip(together.stored, alone.stored, strict=True):
        # One chunk per prompt: what is loaded is what is stored.
        assert size.raw / size.stored == pytest.approx(single.raw / single.stored, rel=0.01)


def test_a_form_below_a_codec_is_what_the_codec_gets(codecs: Any) -> None:
    """With FP8 below an exact codec: the values of FP8, in the bytes of the exact codec."""
    exact = open_codec("raw", torch.bfloat16, geometry=GEOMETRY)
    fp8 = BASELINES["fp8-e4m3"](GEOMETRY, torch.bfloat16)
    both = FormCodec(fp8, exact)
    k, v = chunk(0)
    blob = both.encode(k, v, 128, b"name")
    assert len(blob) == len(exact.encode(k, v, 128, b"name"))
    loaded = both.decode(blob, 128, 64, b"name")
    form = BaselineCodec(fp8)
    alone = form.decode(form.encode(k, v, 128), 128, 64)
    assert not torch.equal(loaded.k, k)
    torch.testing.assert_close(loaded.k, alone.k, rtol=0.07, atol=0.01)
    torch.testing.assert_close(loaded.v, alone.v, rtol=0.07, atol=0.01)


def test_a_form_below_our_codec_shares_passes(reference_model: Path, tmp_path: Path) -> None:
    chosen = [methods.find(name) for name in ("kvtc-16x", "fp8-e4m3+kvtc-16x")]
    trips = carrier(chosen, str(reference_model), tmp_path).override["round_trips"]
    plain, below = (trips[method.name] for method in chosen)
    assert below == {**plain, "below": "fp8-e4m3"}
    single = alone(chosen[1], str(reference_model), tmp_path)
    assert (single.override, single.ratio) == (below, None)
    assert alone(chosen[0], str(reference_model), tmp_path) == chosen[0]


def test_a_method_alone_has_what_it_needs(reference_model: Path, tmp_path: Path) -> None:
    """As processes run it that have one method: a fitted baseline gets its statistics."""
    (tmp_path / "statistics.safetensors").touch()  # as if they were made
    for name in ("lorc", "fp8-e4m3+kvtc-8x"):
        single = alone(methods.find(name), str(reference_model), tmp_path)
        evaluation = single.connector_config(128)["evaluation"]
        assert evaluation.get("options") or evaluation["below"] == "fp8-e4m3"
    with pytest.raises(AssertionError):
        methods.find("fp8-e4m3+kvtc-8x").connector_config(128)
