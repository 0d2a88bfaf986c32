"""States to blobs and back, from the blocks of every layer's own table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.connector.state_bytes import StateBytes
from kvtc_vllm.connector.state_transfer import StateTransfer, state_codec
from kvtc_vllm.offload.geometry import CacheGroup
from kvtc_vllm.offload.messages import LoadItem, StoreItem
from kvtc_vllm.offload.reach import LastState
from kvtc_vllm.tiers.keys import RecordKey
from kvtc_vllm.vllm_cache.compat import UnsupportedError

PARTS = ((150, torch.bfloat16), (250, torch.float32))
SIZE = 1300
"""Bytes of a layer's states: not whole heads of the codec's view."""
GROUP = CacheGroup(
    layer_names=("layers.0", "layers.1", "layers.2"),
    block_size=256,
    num_kv_heads=0,
    head_size=0,
    head_size_v=0,
    dtype=torch.uint8,
    reach=LastState(),
    layer_table=(0, 2, 0),
    state_bytes=SIZE,
    state_parts=PARTS,
)
KEY = RecordKey(b"key")


def caches() -> dict[str, torch.Tensor]:
    """Pages of 2,048 bytes, of which a state takes the first; every bit pattern occurs."""
    torch.manual_seed(0)
    pages = [torch.randint(-128, 128, (8, 2048), dtype=torch.int8) for _ in GROUP.layer_names]
    return {
        name: page[:, :SIZE].view(8, 1, 1, SIZE)
        for name, page in zip(GROUP.layer_names, pages, strict=True)
    }


def test_a_state_comes_back_in_other_blocks() -> None:
    pages = caches()
    transfer = StateTransfer(pages, GROUP)
    staged = transfer.stage([StoreItem(KEY, 256, [3, 5])])
    before = {name: page.clone() for name, page in pages.items()}
    for page in pages.values():
        page.zero_()
    (blob,) = transfer.encode(staged)
    assert isinstance(blob, bytes)
    assert SIZE < len(blob) <= transfer.codec.max_blob_bytes(1)
    assert transfer.load([(LoadItem(KEY, 256, 0, [1, 2]), blob)]) == [None]
    for name, source, target in (("layers.0", 3, 1), ("layers.1", 5, 2), ("layers.2", 3, 1)):
        assert torch.equal(pages[name][target], before[name][source])
        others = [block for block in range(8) if block != target]
        assert not pages[name][others].any()


def test_a_state_under_another_name_or_damaged_is_refused_and_writes_nothing() -> None:
    pages = caches()
    transfer = StateTransfer(pages, GROUP)
    (blob,) = transfer.encode(transfer.stage([StoreItem(KEY, 256, [3, 5])]))
    assert isinstance(blob, bytes)
    before = {name: page.clone() for name, page in pages.items()}
    damaged = blob[:300] + bytes([blob[300] ^ 1]) + blob[301:]
    for item, content in (
        (LoadItem(RecordKey(b"other"), 256, 0, [1, 2]), blob),
        (LoadItem(KEY, 512, 0, [1, 2]), blob),
        (LoadItem(KEY, 256, 0, [1, 2]), damaged),
    ):
        (error,) = transfer.load([(item, content)])
        assert error is not None
    assert all(torch.equal(pages[name], before[name]) for name in pages)


def test_pages_of_another_size_are_refused() -> None:
    pages = caches()
    pages["layers.1"] = pages["layers.1"][..., :-4]
    with pytest.raises(UnsupportedError, match=r"layer layers.1: a page .* does not hold the 1300"):
        StateTransfer(pages, GROUP)
    del pages["layers.1"]
    with pytest.raises(UnsupportedError, match="have states, but no KV cache"):
        StateTransfer(pages, GROUP)


def test_room_for_states_is_what_they_are_filled_up_to() -> None:
    assert state_codec(GROUP, rounds=False).geometry.num_kv_heads == 3
    assert state_codec(GROUP, rounds=True).geometry.num_kv_heads == 2
    assert StateTransfer(caches(), GROUP).staged_bytes(2) == 3 * SIZE


def test_equal_exponents_compress_and_rounding_is_to_nearest() -> None:
    """Numbers like those of states: signs and exponents of few kinds, mantissas of any."""
    torch.manual_seed(1)
    values = torch.randn(3, 40000)
    pages = values.view(torch.uint8)
    exact, rounded = (StateBytes(((40000, torch.float32),), rounds) for rounds in (False, True))
    assert torch.equal(exact.unpack(exact.pack(pages)), pages)
    kept = rounded.unpack(rounded.pack(pages)).view(torch.float32)
    assert torch.equal(kept, values.to(torch.bfloat16).float())
    assert rounded.stored_bytes * 2 == exact.stored_bytes == exact.page_bytes

    group = replace(GROUP, state_bytes=160000, state_parts=((40000, torch.float32),))
    sizes = []
    for rounds in (False, True):
        names = {
            name: of_layer.clone().view(1, 1, 40000)
            for name, of_layer in zip(group.layer_names, values, strict=True)
        }
        transfer = StateTransfer(names, group, rounds)
        (blob,) = transfer.encode(transfer.stage([StoreItem(KEY, 256, [0, 0])]))
        assert isinstance(blob, bytes)
        assert transfer.load([(LoadItem(KEY, 256, 0, [0, 0]), blob)]) == [None]
        expected = values[1].to(torch.bfloat16).float() if rounds else values[1]
        assert torch.equal(names["layers.1"].flatten(), expected)
        sizes.append(len(blob) / (3 * 160000))
    # A plane in four of float32, in two of bfloat16, holds next to nothing.
    assert 0.7 < sizes[0] < 0.9
    assert 0.2 < sizes[1] < 0.4
