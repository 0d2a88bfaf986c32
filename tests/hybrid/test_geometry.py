"""vLLM's cache groups as ours: what is stored together, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1 import kv_cache_interface as specs

from kvtc_vllm.config import ConfigError, load_config
from kvtc_vllm.connector.artifact_lookup import group_cards
from kvtc_vllm.connector.latent_ratio import with_latent_ratio
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, check_chunks
from kvtc_vllm.offload.reach import FULL, ChunkedLocal, LastState, SlidingWindow, named_reach
from kvtc_vllm.vllm_cache import geometry
from kvtc_vllm.vllm_cache.compat import UnsupportedError
from kvtc_vllm.vllm_cache.geometry import read_geometry
from kvtc_vllm.vllm_cache.layout import paged_layouts
from tests.connector.test_layout import packed

SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def full(**changes: Any) -> Any:
    return specs.FullAttentionSpec(**{**SHAPE, **changes})


def window(tokens: int = 512, **changes: Any) -> Any:
    return specs.SlidingWindowSpec(**{**SHAPE, **changes}, sliding_window=tokens)


def local(tokens: int, **changes: Any) -> Any:
    return specs.ChunkedLocalAttentionSpec(**{**SHAPE, **changes}, attention_chunk_size=tokens)


def engine(**changes: Any) -> Any:
    parallel = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        **changes.get("parallel", {}),
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(
            cache_dtype=changes.get("cache_dtype", "auto"),
            block_size=32,
            enable_prefix_caching=True,
            prefix_match_unit=None,
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            hf_text_config=SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64),
        ),
        speculative_config=changes.get("speculative"),
        kv_transfer_config=object(),
    )


def read(*groups: tuple[Any, Sequence[int]], **changes: Any) -> CacheGeometry:
    """Geometry of vLLM's groups, each a spec and the numbers of its layers."""
    config = SimpleNamespace(
        kv_cache_groups=[
            specs.KVCacheGroupSpec([f"model.layers.{n}.attn" for n in numbers], spec)
            for spec, numbers in groups
        ]
    )
    return read_geometry(engine(**changes), config)


@pytest.fixture(autouse=True)
def release(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the first release that can be told of failed loads, whatever is installed."""
    monkeypatch.setattr(geometry, "vllm_version", lambda: "0.30.0")


def numbers(group: CacheGroup) -> list[int]:
    return [geometry.layer_number(name) for name in group.layer_names]


def test_one_group_of_full_attention_is_as_ever() -> None:
    found = read((full(), [1, 0, 2]))
    (group,) = found.groups
    assert numbers(group) == [0, 1, 2]
    assert (group.reach, group.tables, group.layer_table) == (FULL, (0,), ())
    assert found.keeps_all
    assert (found.hash_tokens, found.boundary_tokens, found.block_tables) == (32, 32, 1)
    assert group_cards(found) == ()


def test_layers_of_one_shape_are_stored_together_however_they_were_dealt() -> None:
    """Gemma 3: five groups of windows, then one of full attention."""
    dealt = [(window(), [n, n + 6]) for n in range(5)]
    found = read(*dealt, (full(), [5, 11]))
    first, second = found.groups
    assert (first.reach, second.reach) == (FULL, SlidingWindow(512))
    assert numbers(first) == [5, 11]
    assert numbers(second) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert first.tables == (5,)
    assert second.tables == (0, 1, 2, 3, 4)
    assert second.layer_table == (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)
    assert not found.keeps_all
    assert found.block_tables == 6
    assert [card.attention for card in group_cards(found)] == ["full", "window 512"]
    assert group_cards(found)[0].layers == (5, 11)


def test_blocks_and_heads_of_two_sizes() -> None:
    """Gemma 4: pages of one size hold more tokens where heads are smaller."""
    wide = full(head_size=128)
    found = read((window(block_size=64), [0, 1]), (wide, [2]))
    assert [(g.block_size, g.head_size) for g in found.groups] == [(32, 128), (64, 64)]
    assert (found.hash_tokens, found.boundary_tokens) == (32, 64)
    check_chunks(load_config({"codec": "raw", "chunk_tokens": 192}), found)
    with pytest.raises(ConfigError, match="chunk_tokens=96 must be a multiple of 64, for whole"):
        check_chunks(load_config({"codec": "raw", "chunk_tokens": 96}), found)


def test_local_chunks_and_windows_of_two_lengths() -> None:
    found = read((local(8192), [0]), (window(128), [1]), (window(256), [2]), (full(), [3]))
    assert [g.reach for g in found.groups] == [
        FULL,
        ChunkedLocal(8192),
        SlidingWindow(128),
        SlidingWindow(256),
    ]


def test_a_window_alone_keeps_not_all() -> None:
    found = read((window(4096), [0, 1]))
    assert [g.reach for g in found.groups] == [SlidingWindow(4096)]
    assert not found.keeps_all


@pytest.mark.parametrize(
    "groups", [[(window(), [0])], [(window(), [0]), (full(), [1])], [(local(256), [0])]]
)
def test_older_releases_are_refused_in_a_sentence_that_names_0_30(
    groups: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "vllm_version", lambda: "0.29.1")
    with pytest.raises(UnsupportedError, match=r"need vLLM 0\.30 or later.*this is 0\.29\.1") as e:
        read(*groups)
    assert "--disable-hybrid-kv-cache-manager" in str(e.value)
    read((full(), [0]))


def test_other_kinds_are_refused_by_name() -> None:
    """Subclasses of what is served are other things."""
    sinks = specs.SinkFullAttentionSpec(**SHAPE, sink_len=4)
    with pytest.raises(UnsupportedError, match="2 x SinkFullAttentionSpec, 1 x FullAttentionSpec"):
        read((sinks, [0]), (sinks, [1]), (full(), [2]))


def latents(elements: int = 576) -> Any:
    return specs.MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1, "head_size": elements})


def test_a_latent_is_v_and_its_rotated_key_is_k() -> None:
    (group,) = read((latents(), [0, 1])).groups
    assert (group.num_kv_heads, group.head_size, group.head_size_v) == (1, 64, 512)
    assert (group.latent, group.kind, group.reach) == (True, "latent", FULL)
    assert group.token_bytes == 2 * 576 * 2
    # A page holds the latent first; some releases leave the only head out of its shape.
    for shape in ((5, 1, 32, 576), (5, 32, 576)):
        caches = {name: torch.randn(shape).to(torch.bfloat16) for name in group.layer_names}
        (layout,) = paged_layouts(caches, CacheGeometry((group,), 1))
        k, v = layout.gather([3, 1])
        first = caches[group.layer_names[0]].view(5, 32, 576)[[3, 1]].view(64, 576)
        assert torch.equal(v[:, 0, 0], first[:, :512])
        assert torch.equal(k[:, 0, 0], first[:, 512:])
        assert [side.head_size for side in (layout.sides().k, layout.sides().v)] == [64, 512]
        layout.scatter([0, 2], k, v)
        copied = caches[group.layer_names[0]].view(5, 32, 576)[[0, 2]].view(64, 576)
        assert torch.equal(copied, first)


def test_what_else_a_cache_of_latents_may_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"704 elements per token is refused.*sparse"):
        read((latents(704), [0]))
    with pytest.raises(UnsupportedError, match="--kv-cache-dtype='fp8' is refused for MLA"):
        read((latents(), [0]), cache_dtype="fp8")


def test_presets_code_latents_at_8x_at_most() -> None:
    ours, others = read((latents(), [0])), read((full(), [0]))
    config = load_config({"codec": "kvtc", "ratio": 16})
    assert with_latent_ratio(config, ours, {"preset"}).target_ratio == 8
    assert with_latent_ratio(config, ours, {"ratio"}).target_ratio == 16
    assert with_latent_ratio(config, others, {"preset"}).target_ratio == 16
    raw = load_config({"codec": "raw"})
    assert with_latent_ratio(raw, ours, {"preset"}) is raw


def test_pipeline_stages_of_one_group_are_served_and_context_parallel_is_not() -> None:
    two = {"parallel": {"pipeline_parallel_size": 2, "tensor_parallel_size": 3}}
    found = read((full(), [0, 1]), **two)
    assert (found.tp_size, found.pp_size, found.ranks) == (3, 2, 6)
    with pytest.raises(
        UnsupportedError, match=r"--pipeline-parallel-size=2 .* with 2 KV cache groups"
    ):
        read((full(), [0]), (window(), [1]), **two)
    with pytest.raises(UnsupportedError, match="--decode-context-parallel-size=2 is not supported"):
        read((full(), [0]), parallel={"decode_context_parallel_size": 2})


def test_states_have_bytes_and_no_heads() -> None:
    spec = specs.MambaSpec(
        block_size=64,
        shapes=((3, 8), (4, 4)),
        dtypes=(torch.bfloat16, torch.float32),
        mamba_cache_mode="align",
    )
    found = read((spec, [0]), (spec, [2]), (full(block_size=64), [1]))
    (attention, states) = found.groups
    assert found.coded_groups == (attention,)
    assert states.reach == LastState()
    assert states.tables == (0, 1)
    assert states.state_parts == ((24, torch.bfloat16), (16, torch.float32))
    assert states.state_bytes == 3 * 8 * 2 + 4 * 4 * 4
    assert states.raw_bytes([5, 6]) == 2 * states.state_bytes
    assert group_cards(found) == ()


def test_states_without_prefix_caching_are_refused() -> None:
    """Then vLLM keeps one state per request, at its end."""
    spec = specs.MambaSpec(block_size=64, shapes=((4, 4),), dtypes=(torch.float32,))
    with pytest.raises(UnsupportedError, match=r"in mode 'none'.*--enable-prefix-caching"):
        read((spec, [0]))


def test_speculative_decoding_is_refused_for_windows_only() -> None:
    read((full(), [0]), speculative=object())
    with pytest.raises(UnsupportedError, match="speculative decoding is not supported for models"):
        read((full(), [0]), (window(), [1]), speculative=object())


def test_rows_come_from_the_blocks_of_each_layer_s_table() -> None:
    found = read((window(), [0, 2]), (window(), [1]), (full(), [3]))
    torch.manual_seed(0)
    caches = {f"model.layers.{n}.attn": torch.randn(20, 2, 32, 128).bfloat16() for n in range(4)}
    group = found.groups[1]
    layout = packed({name: caches[name] for name in group.layer_names}, group)
    copied = layout.gather([3, 4, 7, 8])
    pages = [caches["model.layers.0.attn"], caches["model.layers.1.attn"]]
    for layer, blocks in ((0, [3, 4]), (1, [7, 8])):
        rows = pages[layer][blocks].transpose(1, 2).flatten(0, 1)
        assert torch.equal(copied[0][:, layer], rows[..., :64])
        assert torch.equal(copied[1][:, layer], rows[..., 64:])
    layout.scatter([13, 14, 17, 18], *copied)
    assert torch.equal(pages[0][[13, 14]], pages[0][[3, 4]])
    assert torch.equal(pages[1][[17, 18]], pages[1][[7, 8]])
    before = pages[1][[13, 14]].clone()
    layout.zero([13, 14, 17, 18])
    assert not pages[0][[13, 14]].any()
    assert torch.equal(pages[1][[13, 14]], before)


def test_layers_that_read_another_s_kv_are_left_out() -> None:
    found = read((window(), [0]), (full(), [1]))
    caches = {f"model.layers.{n}.attn": torch.zeros(4, 2, 32, 128) for n in range(2)}
    caches = {name: tensor.bfloat16() for name, tensor in caches.items()}
    shared = {**caches, "model.layers.2.attn": caches["model.layers.0.attn"]}
    assert len(paged_layouts(shared, found)) == 2
    stranger = {**caches, "model.layers.2.attn": torch.zeros(4, 2, 32, 128).bfloat16()}
    with pytest.raises(UnsupportedError, match=r"unexpected \['model.layers.2.attn'\]"):
        paged_layouts(stranger, found)


@pytest.mark.parametrize("reach", [FULL, LastState(), SlidingWindow(512), ChunkedLocal(8192)])
def test_names_of_attention_are_read_as_they_are_written(reach: Any) -> None:
    assert named_reach(str(reach)) == reach


@pytest.mark.parametrize("name", ["", "window", "window 0", "window x", "global 5"])
def test_other_names_of_attention_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not known; full, state, window N"):
        named_reach(name)


@pytest.mark.parametrize(("pooling", "resumes"), [("LAST", True), ("MEAN", False), ("CLS", False)])
def test_answers_that_need_every_token_are_refused(
    reference_model: Path, pooling: str, resumes: bool
) -> None:
    """vLLM asks a connector for prefixes of such a model, and ends when it is given one."""
    made = EngineArgs(
        model=str(reference_model),
        dtype="float32",
        max_model_len=512,
        runner="pooling",
        convert="embed",
        pooler_config={"seq_pooling_type": pooling},
    ).create_engine_config()
    group = specs.KVCacheGroupSpec(["model.layers.0.attn"], full(dtype=torch.float32))
    config = SimpleNamespace(kv_cache_groups=[group])
    if resumes:
        assert read_geometry(made, config).keeps_all
        return
    with pytest.raises(UnsupportedError, match=f"seq_pooling_type={pooling} and .* is refused"):
        read_geometry(made, config)
    assert read_geometry(made, config, resumes=False).keeps_all


@pytest.mark.skipif(
    "is_diffusion" not in vars(ModelConfig), reason="this vLLM has no diffusion models"
)
def test_diffusion_models_are_refused() -> None:
    """With vLLM's own rule of which these are."""
    model = type("Model", (), {"is_diffusion": vars(ModelConfig)["is_diffusion"]})()
    model.hf_config = SimpleNamespace(canvas_length=32)
    diffuses = engine()
    diffuses.model_config.is_diffusion = model.is_diffusion
    group = specs.KVCacheGroupSpec(["model.layers.0.attn"], full())
    with pytest.raises(UnsupportedError, match="a diffusion model is refused"):
        read_geometry(diffuses, SimpleNamespace(kv_cache_groups=[group]))
