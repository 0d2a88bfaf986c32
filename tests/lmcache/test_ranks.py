"""kv_rank, pipeline stages, records and names: plain arithmetic, without LMCache."""

from __future__ import annotations

import pytest
import torch

from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.lmcache.ranks import Shard, layers_of_stage, shard_of, stage_layers
from kvtc_vllm.lmcache.records import (
    RECORD_BYTES,
    blob_key,
    original_key,
    pack_record,
    record_key,
    unpack_record,
)
from tests.codec.synthetic import SyntheticModel
from tests.lmcache.chunks import Key


def test_kv_rank() -> None:
    shard = shard_of(8 << 24 | 5 << 16 | 4 << 8 | 1, pipeline_ranks=2)
    assert shard == Shard(8, 5, 2)
    assert (shard.tp_size, shard.tp_rank, shard.pp_rank) == (4, 1, 1)
    for kv_rank, stages in ((0, 1), (2 << 24 | 2 << 16, 1), (3 << 24, 2)):
        with pytest.raises(ArtifactError):
            shard_of(kv_rank, stages)


@pytest.mark.parametrize(("layers", "stages"), [(8, 1), (8, 2), (10, 4), (7, 3), (61, 8)])
def test_stages_are_vllms(layers: int, stages: int) -> None:
    utils = pytest.importorskip("vllm.distributed.utils")
    for stage in range(stages):
        assert stage_layers(layers, stages, stage) == utils.get_pp_indices(layers, stage, stages)


def test_a_stage_codes_its_layers_alone() -> None:
    model = SyntheticModel(
        num_layers=4, num_kv_heads=2, head_size=16, layer_groups=((0, 2), (2, 4))
    )
    artifact = model.artifact(ratios=(8.0,))
    k, v = model.chunk(tokens=64, start=64, seed=7, dtype=torch.bfloat16)
    whole = KvtcCodec(artifact, 8.0, torch.bfloat16)
    want = whole.decode(whole.encode(k, v, 64))
    for first, end in ((0, 2), (2, 4)):
        codec = KvtcCodec(layers_of_stage(artifact, first, end), 8.0, torch.bfloat16)
        got = codec.decode(codec.encode(k[:, first:end], v[:, first:end], 64))
        assert torch.equal(got.k, want.k[:, first:end])
        assert torch.equal(got.v, want.v[:, first:end])
    with pytest.raises(ArtifactError, match="whole layer groups"):
        layers_of_stage(artifact, 0, 3)


def test_records() -> None:
    record = pack_record(123456)
    assert len(record) == RECORD_BYTES
    assert unpack_record(record) == 123456
    for i in range(8 * RECORD_BYTES):
        bad = bytearray(record)
        bad[i // 8] ^= 1 << i % 8
        assert unpack_record(bytes(bad)) is None
    assert unpack_record(record[:-1]) is None


def test_names() -> None:
    key = Key(b"h", model_name="org/model-1.5", cache_salt="s")
    record = record_key(key, "0123456789abcdef")
    blob = blob_key(record, 4711)
    assert len({key, record, blob, blob_key(record, 4712)}) == 4
    assert original_key(blob) == key
    assert original_key(record) is None
    assert original_key(key) is None
