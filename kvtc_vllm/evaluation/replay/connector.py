"""The bench's connector: ours, with something else in the place of the codec if asked."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.artifact.rank_file import read_rank_file
from kvtc_vllm.codec.base import Coder
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.config import load_config
from kvtc_vllm.connector.connector import KVTCConnector
from kvtc_vllm.evaluation.baselines import BASELINES, Baseline
from kvtc_vllm.evaluation.replay.baseline_codec import BaselineCodec, FormCodec
from kvtc_vllm.evaluation.replay.noise import Noise, NoiseCodec
from kvtc_vllm.evaluation.replay.round_trips import RoundTripCodec
from kvtc_vllm.evaluation.replay.variants import VARIANTS, VariantContext
from kvtc_vllm.offload.geometry import CacheGroup, codec_geometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig

NAME = "KVTCEvaluationConnector"
MODULE = "kvtc_vllm.evaluation.replay.connector"


class CodecOverride(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What takes the codec's place. The codec stays if nothing is given."""

    baseline: str | None = None
    """Name in `BASELINES`."""
    variant: str | None = None
    """Name in `VARIANTS`."""
    artifact: str | None = None
    """Rank file that the variant changes; of several cache groups the first's."""
    ratio: float | None = None
    """Target ratio of the variant."""
    options: dict[str, Any] = {}
    """Keyword arguments of the baseline, or what the variant takes."""
    settings: dict[str, float] = {}
    """Of the baseline; others have its own values."""
    below: str | None = None
    """Name of a baseline through which chunks go before the variant encodes and after it decodes:
    a cache that holds that form."""
    noise: Noise | None = None
    """Chunks are stored exact, and records of one cache group are loaded with noise."""
    round_trips: dict[str, CodecOverride] = {}
    """By name, methods that share exact chunks; then nothing else is given."""
    sixteen_bits: bool = False
    """A cache of float32 stands for one of bfloat16; with `round_trips` only."""


class KVTCEvaluationConnector(KVTCConnector):
    """`KVTCConnector` with the key `evaluation` in its configuration."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        assert vllm_config.kv_transfer_config is not None
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config)
        wanted = msgspec.convert(extra.pop("evaluation", {}), CodecOverride)
        stays = wanted == CodecOverride()
        super().__init__(
            vllm_config,
            role,
            kv_cache_config,
            config=load_config(extra),
            codec_factory=None if stays else partial(override_codec, wanted),
        )

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk, whole blocks of every cache group."""
        return self._config.chunk_tokens

    @property
    def boundary_tokens(self) -> int:
        """Tokens between two places where a request may go on."""
        return self._geometry.boundary_tokens


def override_codec(
    wanted: CodecOverride,
    number: int,
    group: CacheGroup,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
) -> Coder:
    """What takes the codec's place; a `CodecFactory` for what is wanted."""
    exact = open_codec("raw", group.dtype, geometry=codec_geometry(group))
    if wanted.round_trips:
        stands = wanted.sixteen_bits and group.dtype == torch.float32
        held = torch.bfloat16 if stands else group.dtype
        methods = {
            name: override_codec(method, number, replace(group, dtype=held), ropes, layer_rope)
            for name, method in wanted.round_trips.items()
        }
        return RoundTripCodec(exact, methods, held)
    if wanted == CodecOverride():
        return exact
    if wanted.noise is not None:
        return NoiseCodec(exact, wanted.noise) if wanted.noise.group == number else exact
    if wanted.baseline is not None:
        options = {**wanted.options, **wanted.settings}
        return BaselineCodec(_baseline(wanted.baseline, group, ropes, layer_rope, options))
    assert wanted.variant is not None
    assert wanted.artifact is not None
    assert wanted.ratio is not None
    first = Path(wanted.artifact)
    artifact, _ = read_rank_file(group_directory(first.parent, number) / first.name, 0, 1)
    artifact = replace(artifact, ropes=ropes, layer_rope=layer_rope)
    context = VariantContext(artifact, wanted.ratio, group.dtype, wanted.options)
    codec = VARIANTS[wanted.variant](context)
    if wanted.below is None:
        return codec
    return FormCodec(_baseline(wanted.below, group, ropes, layer_rope, {}), codec)


def _baseline(
    name: str,
    group: CacheGroup,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    options: dict[str, Any],
) -> Baseline:
    per_layer = [None if index is None else ropes[index] for index in layer_rope]
    return BASELINES[name](codec_geometry(group), group.dtype, per_layer, **options)
