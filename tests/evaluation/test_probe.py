"""Noise in the cache, and sensitivities made of what it did."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kvtc_vllm.calibration.capture import CaptureSettings, capture_rows
from kvtc_vllm.calibration.documents import DataError, Document
from kvtc_vllm.calibration.gradients import GradientSettings, spool_sensitivity
from kvtc_vllm.calibration.sensitivity import Sensitivity, load_sensitivity
from kvtc_vllm.calibration.spool import SpoolReader, SpoolWriter
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import KINDS, Geometry
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.evaluation import probe
from kvtc_vllm.evaluation.probe import (
    Place,
    Probe,
    average,
    layer_deviations,
    marked,
    probe_prefix,
    replay_options,
)
from kvtc_vllm.evaluation.processes import run_probe
from kvtc_vllm.evaluation.processes.run_probe import Effect, ProbeJob, ProbeOutcome
from kvtc_vllm.evaluation.replay import two_passes
from kvtc_vllm.evaluation.replay.connector import CodecOverride, override_codec
from kvtc_vllm.evaluation.replay.noise import TALLY, Noise, NoiseCodec
from kvtc_vllm.evaluation.replay.round_trips import TURN
from kvtc_vllm.offload.geometry import CacheGroup
from tests.calibration.toy import HEADS, LAYERS, SIZE, SIZE_V, toy_header, toy_rope

GEOMETRY = Geometry(3, 2, 16, 16, ((0, 3),))
CACHE_GROUP = CacheGroup(("a", "b", "c"), 16, 2, 16, 16, torch.bfloat16)
NOISE = Noise(kind="v", layer=1, deviation=0.5, first=4)


def chunk(seed: int = 0, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(tokens, 3, 2, 16, generator=generator).bfloat16() for _ in range(2))
    return k, v


def codec(**changes: object) -> NoiseCodec:
    exact = open_codec("raw", torch.bfloat16, geometry=GEOMETRY)
    return NoiseCodec(exact, msgspec.structs.replace(NOISE, **changes))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_in_one_layer_and_its_energy_is_counted(kind: str) -> None:
    k, v = chunk()
    noisy = codec(kind=kind)
    blob = noisy.encode(k, v, 0, b"name")
    TALLY.clear()
    loaded = noisy.decode(blob, 0, 64, b"name")
    changed, same = (loaded.k, loaded.v) if kind == "k" else (loaded.v, loaded.k)
    clean, other = (k, v) if kind == "k" else (v, k)
    assert torch.equal(same, other)
    difference = (changed.double() - clean.double()).square()
    assert not difference[:, [0, 2]].any()
    assert not difference[:4].any()
    assert bool((difference[4:, 1].sum((1, 2)) > 0).all())
    energy, tokens = TALLY.total()
    assert energy == pytest.approx(float(difference.sum()))
    assert energy == pytest.approx(0.25 * 60 * 32, rel=0.1)
    assert tokens == 60
    # Loaded again, it is the same, and counts once.
    again = noisy.decode(blob, 0, 64, b"name")
    assert torch.equal(again.k, loaded.k)
    assert torch.equal(again.v, loaded.v)
    assert TALLY.total() == (energy, tokens)


def test_other_chunks_and_layers_have_other_noise() -> None:
    k, v = torch.zeros_like(chunk()[0]), torch.zeros_like(chunk()[1])
    drawn = []
    for key, layer in ((b"a", 1), (b"b", 1), (b"a", 2)):
        noisy = codec(layer=layer)
        drawn.append(noisy.decode(noisy.encode(k, v, 128, key), 128, 64, key).v[:, layer])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_marked_tokens_stay_exact() -> None:
    k, v = chunk()
    v[[20, 40]] *= 0.01
    noisy = codec(rule=SinkRule((0, 1, 2), -1.0))
    TALLY.clear()
    loaded = noisy.decode(noisy.encode(k, v, 128, b"x"), 128, 64, b"x")
    exact = (loaded.v == v).all(dim=-1).all(dim=-1).all(dim=-1).nonzero().flatten().tolist()
    assert exact == [20, 40]
    assert TALLY.total()[1] == 62


def test_a_noise_travels_in_a_configuration() -> None:
    noise = msgspec.structs.replace(NOISE, rule=SinkRule((0, 1), -1.0))
    trips = {"v1": {"noise": msgspec.to_builtins(noise)}}
    wanted = msgspec.convert({"round_trips": trips}, CodecOverride)
    assert wanted.round_trips["v1"].noise == noise


def test_every_noise_has_its_turn_in_every_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The passes are replaced; what is left adds up their divergence and the noise's energy."""
    costs = {None: 0.25, "k0": 1.0, "v0": 3.0}
    turns: list[str | None] = []

    def replayed(engine: object, task: str, context: int, batch: list, *_: object) -> Iterator[Any]:
        turns.append(TURN.method)
        if TURN.method is not None:
            TALLY.count(b"chunk", 8.0, 100)
        yield from (SimpleNamespace(kl=costs[TURN.method]) for _ in batch)

    monkeypatch.setattr(run_probe, "exact_pass", lambda *_: contextlib.nullcontext({}))
    monkeypatch.setattr(run_probe, "replay_pass", replayed)
    monkeypatch.setattr(run_probe, "replay_engine", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(two_passes, "BATCH", 2)
    job = ProbeJob(
        model="m",
        documents=[list(range(140))] * 3,
        prefix_tokens=128,
        noises={
            "k0": msgspec.structs.replace(NOISE, kind="k", layer=0),
            "v0": msgspec.structs.replace(NOISE, layer=0),
        },
        engine={},
        out="",
    )
    found = run_probe.run(job)
    TURN.begin(None)
    assert turns == [None, "k0", "v0"] * 2
    assert found.floor == pytest.approx(3 * 0.25)
    assert found.effects["k0"] == Effect(kl=3.0, energy=16.0, tokens=200)
    assert found.effects["v0"] == Effect(kl=9.0, energy=16.0, tokens=200)


PLACES = [Place(kind, layer, o) for o in (False, True) for kind in KINDS for layer in range(2)]


def outcome(gradients: dict[str, float], floor: float = 0.5) -> ProbeOutcome:
    """What noise of energy 8 does where mean squared gradients are these."""
    return ProbeOutcome(
        floor=floor,
        effects={
            place.name: Effect(
                kl=floor + gradients[place.name] * 8.0 / 2,
                energy=8.0,
                tokens=90 if place.ordinary else 100,
            )
            for place in PLACES
        },
    )


def test_sensitivity_is_twice_the_divergence_over_the_energy() -> None:
    gradients = {place.name: 0.1 * (1 + number) for number, place in enumerate(PLACES)}
    found = outcome(gradients)
    every = average(found, PLACES[:4])
    assert [x for (x,) in every.keys] == pytest.approx([0.1, 0.2])
    assert [x for (x,) in every.values] == pytest.approx([0.3, 0.4])
    assert every.tokens == 100
    # Below the floor there is nothing.
    drowned = outcome(gradients | {"k0": -0.01})
    assert average(drowned, PLACES[:4]).keys[0] == (0.0,)
    sinks = marked(found, PLACES, SinkRule((0,), 0.0))
    assert sinks.share == pytest.approx(0.1)
    assert sinks.energy == 0.0, "ordinary tokens were made to cost more"
    sinks = marked(
        outcome(gradients | {p.name: 0.1 for p in PLACES if p.ordinary}),
        PLACES,
        SinkRule((0,), 0.0),
    )
    assert sinks.energy == pytest.approx(1 - 0.4 * 90 / (1.0 * 100))


def test_prefixes_are_whole_chunks() -> None:
    assert probe_prefix(640, 768) == 640
    assert probe_prefix(700, 768) == 640
    assert probe_prefix(640, 400) == 384
    with pytest.raises(DataError, match="shortest document has 129 tokens; at least 130"):
        probe_prefix(640, 129)


def test_replays_are_in_float32_whatever_the_model_is_served_in() -> None:
    for dtype in ("bfloat16", "float16", "auto"):
        served = {"dtype": dtype, "kv_cache_dtype": "fp8", "max_model_len": 1024}
        wanted = {"dtype": "float32", "kv_cache_dtype": "auto", "max_model_len": 1024}
        assert replay_options(served) == wanted
    assert replay_options({})["dtype"] == "float32"


def test_a_probe_needs_one_rank() -> None:
    capture = CaptureSettings(model="m", data=("d",), tp=2)
    with pytest.raises(ArtifactError, match="--sensitivity probe: needs --tp 1, not 2"):
        Probe(capture).check()
    Probe(replace(capture, tp=1)).check()


@pytest.mark.vllm
@pytest.mark.slow
def test_probe_and_gradients_agree(reference_model: Path, tmp_path: Path) -> None:
    """Two ways to one number: noise in vLLM, and derivatives in transformers.

    Rows are captured in 16 bits. Replays in 16 bits as well would measure rounding.
    """
    sys.path.insert(0, str(reference_model.parent))
    import data

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(data.texts("train", "mix", characters=40_000)))
    capture = CaptureSettings(
        model=str(reference_model),
        data=(str(text),),
        tokens=3000,
        max_len=900,
        engine={
            "block_size": 32,
            "max_model_len": 1024,
            "num_gpu_blocks_override": 128,
            "dtype": "bfloat16",
        },
    )
    spool = tmp_path / "spool"
    record = capture_rows(capture, spool)
    settings = GradientSettings(documents=4, prefix_tokens=256, continuation_tokens=48)
    said: list[str] = []

    def read(path: Path) -> Sensitivity:
        header = SpoolReader(spool / "rank0").header
        return load_sensitivity(path, header.geometry.num_layers, header.total_kv_heads)

    probed = read(Probe(capture, settings).measure(record, spool, said.append))
    assert "used again" not in said[-1]
    assert read(Probe(capture, settings).measure(record, spool, said.append)) == probed
    assert "used again" in said[-1]
    by_gradients = read(spool_sensitivity(capture, record, spool, settings, "cpu"))
    assert (probed.method, by_gradients.method) == ("probe", "gradient")
    assert probed.documents == by_gradients.documents
    logs = [
        torch.cat(list(RowWeights(found).of_layers().values())).log()
        for found in (probed, by_gradients)
    ]
    assert float(torch.corrcoef(torch.stack(logs))[0, 1]) > 0.9


def test_noise_goes_into_one_cache_group() -> None:
    """Records of others are loaded exact."""
    wanted = CodecOverride(noise=msgspec.structs.replace(NOISE, group=1))
    groups = [override_codec(wanted, number, CACHE_GROUP, (), (None,) * 3) for number in range(2)]
    assert [isinstance(of_group, NoiseCodec) for of_group in groups] == [False, True]


def test_every_cache_group_is_probed_within_its_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is replaced by one in which an error costs more the later its layer comes."""
    places = [tmp_path, tmp_path / "group1"]
    for place, attention in zip(places, ("full", "window 9"), strict=True):
        header = toy_header(attention=attention, layers=tuple(range(LAYERS)))
        with SpoolWriter(place / "rank0", header, (toy_rope(),)) as writer:
            generator = torch.Generator().manual_seed(len(attention))
            k, v = (
                torch.randn(64, LAYERS, HEADS, size, generator=generator).bfloat16()
                for size in (SIZE, SIZE_V)
            )
            writer.append(k, v, torch.arange(4, 68), 0, False)
    jobs: list[ProbeJob] = []

    def run(child: str, name: str, job: ProbeJob, outcome: type[ProbeOutcome]) -> ProbeOutcome:
        jobs.append(job)
        effects = {
            name: Effect(kl=1.0 + noise.layer + 10 * noise.group, energy=2.0, tokens=5)
            for name, noise in job.noises.items()
        }
        return outcome(floor=0.0, effects=effects)

    monkeypatch.setattr(probe, "run_child", run)
    monkeypatch.setattr(probe, "read_texts", lambda *_: ["text"])
    monkeypatch.setattr(
        Probe, "_documents", lambda *_: [Document(n, [n] * 400, False) for n in range(3)]
    )
    capture = CaptureSettings(model="m", data=("d",))
    record: Any = SimpleNamespace(source=SimpleNamespace(model="c-d"), tp_size=1)
    settings = GradientSettings(documents=2, prefix_tokens=256, continuation_tokens=48)
    said: list[str] = []
    path = Probe(capture, settings).measure(record, tmp_path, said.append)
    (job,) = jobs
    noises = job.noises.values()
    assert len(noises) == 2 * len(KINDS) * LAYERS
    assert {noise.first for noise in noises if noise.group == 0} == {4}
    assert {noise.first for noise in noises if noise.group == 1} == {256 - 9 + 1}
    assert path == tmp_path / "sensitivity.json"
    for number, place in enumerate(places):
        found = load_sensitivity(place / path.name, LAYERS, HEADS)
        wanted = [1.0 + layer + 10 * number for layer in range(LAYERS)]
        assert [x for (x,) in found.all_tokens.keys] == wanted
    Probe(capture, settings).measure(record, tmp_path, said.append)
    assert len(jobs) == 1
    assert "used again" in said[-1]


def test_deviations_are_of_layers(tmp_path: Path) -> None:
    from tests.calibration.fitted import fill

    fill(tmp_path)
    reader = SpoolReader(tmp_path)
    reader.geometry = replace(reader.geometry, layer_groups=((0, 4),))
    found = layer_deviations(reader)
    rows = reader.take(0, "v", reader.select(heldout=False)).view(-1, 4, 8)
    wanted = rows.var(dim=0).mean(dim=1).sqrt().tolist()
    assert found["v"] == pytest.approx(wanted, rel=0.05)
    assert len(found["k"]) == 4
