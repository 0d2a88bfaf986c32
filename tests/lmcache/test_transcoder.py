"""Chunks through the transcoder, without LMCache: positions, identity, refusals, fallbacks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtc_vllm.codec.container import SectionKind, parse
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.config import ConfigError
from kvtc_vllm.lmcache.positions import PositionBook
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.transcoder import Refused, Transcoder
from tests.hybrid.public_configs import PUBLIC
from tests.lmcache.chunks import SETTINGS, TOKENS, Key, chunk, error, fused, kv
from tests.lmcache.paired import paired_artifact

KEY = Key(b"\x01" * 32)


@pytest.fixture(scope="module", params=["apart", "paired"])
def basis(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Settings that name an artifact: the shipped one, or one whose K and V share a basis."""
    if request.param == "apart":
        return {}
    return {"artifact": str(paired_artifact(tmp_path_factory.mktemp("registry"), 16.0))}


def make(book: PositionBook | None = None, **changes: Any) -> Transcoder:
    return Transcoder(load_settings({**SETTINGS, **changes}), book or PositionBook())


def test_round_trip_with_a_position_from_events(basis: dict[str, Any]) -> None:
    book = PositionBook()
    book.learn([KEY.chunk_hash], [512])
    coder = make(book, **basis)
    source = chunk(512)
    blob = coder.encode(source, KEY)
    info = parse(blob)
    codec_id = 2 if basis else 1
    assert (info.header.codec_id, info.header.start, info.header.tokens) == (codec_id, 512, TOKENS)
    assert (SectionKind.CODED_PAIR in {s.kind for s in info.sections}) == bool(basis)
    assert source.nbytes / len(blob) >= 14
    out = torch.zeros_like(source)
    make(**basis).decode(blob, out, KEY)  # another server, which heard no event
    assert error(out, source) < 0.2
    counts = coder.counters.snapshot()
    assert counts["position_event"] == counts["stored_chunks"] == 1
    assert counts["stored_raw_bytes"] == source.nbytes
    assert counts["stored_bytes"] == len(blob)


def test_the_first_chunk_keeps_its_sinks_exact() -> None:
    coder = make()
    source = chunk(0)
    blob = coder.encode(source, KEY)
    assert parse(blob).header.sinks == 4
    out = torch.zeros_like(source)
    coder.decode(blob, out, KEY)
    assert torch.equal(out[:, :, :4], source[:, :, :4])


@pytest.mark.parametrize("start", range(0, 4096, 3 * TOKENS))
def test_a_position_is_recovered_from_the_data(start: int, basis: dict[str, Any]) -> None:
    coder = make(**basis)
    assert parse(coder.encode(chunk(start, seed=start), KEY)).header.start == start
    assert coder.counters.snapshot()["position_recovered"] == 1


def test_a_wrong_event_is_noticed(basis: dict[str, Any]) -> None:
    book = PositionBook()
    book.learn([KEY.chunk_hash], [768])
    coder = make(book, **basis)
    assert parse(coder.encode(chunk(512), KEY)).header.start == 512
    counts = coder.counters.snapshot()
    assert counts["position_contradicted"] == counts["position_recovered"] == 1


@pytest.mark.parametrize(
    "layout",
    [
        lambda k, v: (v, k),  # a layout nobody declared
        lambda k, v: (k, v.flip(2)),  # heads of V alone exchanged
    ],
    ids=["K and V exchanged", "heads of V exchanged"],
)
def test_what_does_not_fit_is_kept_raw(layout: Any, basis: dict[str, Any]) -> None:
    coder = make(**basis)
    source = fused(*layout(*kv(512)))
    blob = coder.encode(source, KEY)
    assert parse(blob).header.codec_id == 0
    out = torch.zeros_like(source)
    coder.decode(blob, out, KEY)
    assert torch.equal(out, source)
    assert coder.counters.snapshot()["stored_raw_chunks"] == 1


def test_chunks_that_were_read_in_another_order_are_not_offered() -> None:
    """A server whose setting was wrong kept them raw, and its log says to set it right."""
    settings: list[dict[str, Any]] = [
        {},
        {"page_order": "cpu", "block_size": 32},
        {"page_order": "cpu", "block_size": 16},
    ]
    source = torch.randn(chunk(0).shape).bfloat16()
    blobs = [make(**one).encode(source, KEY) for one in settings]
    for number, one in enumerate(settings):
        coder, out = make(**one), torch.zeros_like(source)
        for blob in blobs[:number] + blobs[number + 1 :]:
            for call in (coder.verify, partial(coder.decode, chunk=out)):
                with pytest.raises(Refused) as refused:
                    call(blob, key=KEY)
                assert refused.value.reason == "fingerprint"
        assert not out.any()
        coder.decode(blobs[number], out, KEY)
        assert torch.equal(out, source)
    # So one server's are not looked at, and not deleted, by another.
    assert len({make(**one).namespace(KEY) for one in settings}) == len(settings)


def test_a_chunk_between_multiples_is_not_guessed(basis: dict[str, Any]) -> None:
    assert parse(make(**basis).encode(chunk(512 + 100), KEY)).header.codec_id == 0


def test_nan_is_kept_raw_or_dropped() -> None:
    source = chunk(0)
    source[0, 3, 17, 5] = float("nan")
    coder = make()
    out = torch.zeros_like(source)
    coder.decode(coder.encode(source, KEY), out, KEY)
    assert torch.equal(out.view(torch.int16), source.view(torch.int16))
    with pytest.raises(Refused) as refused:
        make(fallback="drop").encode(source, KEY)
    assert refused.value.reason == "uncodable"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chunk_hash": b"\x02" * 32}, "fingerprint"),
        ({"cache_salt": "other tenant"}, "fingerprint"),
        ({"object_group_id": 1}, "fingerprint"),
        ({"kv_rank": 0x01000101}, "fingerprint"),
        ({"kv_rank": 0x02000200}, "fingerprint"),
        ({"kv_rank": 0x02010201}, "fingerprint"),
        ({"kv_rank": 0x03000300}, "artifact"),
        ({"kv_rank": 0x01010100}, "artifact"),
        ({"model_name": "another/model"}, "model"),
    ],
)
def test_a_blob_is_good_under_its_own_name_only(change: dict[str, Any], reason: str) -> None:
    coder = make()
    blob = coder.encode(chunk(256), KEY)
    coder.verify(blob, KEY)
    with pytest.raises(Refused) as refused:
        coder.verify(blob, replace(KEY, **change))
    assert refused.value.reason == reason


def test_artifacts_have_namespaces() -> None:
    coder = make()
    one, two = (coder.namespace(replace(KEY, kv_rank=r)) for r in (0x01000100, 0x02010201))
    assert one != two
    assert coder.namespace(replace(KEY, kv_rank=0x02000200)) == two


def test_another_ratio_of_the_same_artifact_decodes() -> None:
    source = chunk(256)
    out = torch.zeros_like(source)
    make(ratio=32).decode(make(ratio=8).encode(source, KEY), out, KEY)
    assert error(out, source) < 0.1


@pytest.mark.parametrize("place", [0, 3, 60, 100, 5000, -17, -1])
def test_a_flipped_bit_is_found(place: int) -> None:
    coder = make()
    blob = bytearray(coder.encode(chunk(256), KEY))
    blob[place] ^= 0x10
    out = torch.ones_like(chunk(256))
    with pytest.raises(Refused):
        coder.verify(blob, KEY)
    with pytest.raises(Refused):
        coder.decode(blob, out, KEY)
    assert bool((out == 1).all())


@pytest.mark.parametrize("length", [0, 1, 20, 103, 104, 1000])
def test_a_truncated_blob_is_found(length: int) -> None:
    coder = make()
    with pytest.raises(Refused):
        coder.verify(coder.encode(chunk(256), KEY)[:length], KEY)


def test_a_chunk_of_another_length_is_refused() -> None:
    coder = make()
    blob = coder.encode(chunk(256), KEY)
    with pytest.raises(Refused) as refused:
        coder.decode(blob, torch.zeros_like(chunk(0, tokens=128)), KEY)
    assert refused.value.reason == "geometry"


def test_refusals_by_name() -> None:
    coder = make()
    source = chunk(256)
    for bad, reason in (
        (source.view(torch.uint8), "dtype"),
        (source[:, :4].contiguous(), "layout"),
    ):
        with pytest.raises(Refused) as refused:
            coder.encode(bad, KEY)
        assert refused.value.reason == reason


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": "x", "rotio": 16},
        {"model": "x", "ratio": 0},
        {"model": "x", "page_order": "cpu"},
        {"model": "x", "block_size": 32},
        {"model": "x", "fallback": "guess"},
        {"model": "x", "pipeline_ranks": 0},
    ],
)
def test_bad_settings(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_settings(values)


def test_only_a_book_that_hears_events_waits() -> None:
    book = PositionBook(capacity=2)
    assert book.start_of(b"a", wait=60) is None
    book.learn([b"a", b"b", b"c"], [0, 256, 512])
    assert [book.start_of(h, wait=0) for h in (b"a", b"b", b"c")] == [None, 256, 512]


def test_latents_are_refused_at_start(tmp_path: Path) -> None:
    """A chunk of theirs has the shape of one head's K and V, in another order."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["DeepSeek-V3"]))
    with pytest.raises(ArtifactError, match=r"latent attention .MLA.*serve it with KVTCConnector"):
        make(model=str(tmp_path))
    sparse = {**PUBLIC["DeepSeek-V3"], "index_topk": 2048}
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    with pytest.raises(ArtifactError, match="caches of sparse attention are refused"):
        make(model=str(tmp_path))


def test_chunks_of_several_kinds_of_layers_are_refused_by_shape() -> None:
    """With --separate-object-groups a chunk may be of windows, or of states, alone."""
    windows = chunk(0)[:, :3].contiguous()
    with pytest.raises(Refused, match=r"the artifact is for \d+ layers") as refused:
        make().encode(windows, KEY)
    assert refused.value.reason == "layout"
    states = torch.zeros(1, 6, 1, 4096, dtype=torch.int8)
    with pytest.raises(Refused, match="the chunk is int8"):
        make().encode(states, KEY)
