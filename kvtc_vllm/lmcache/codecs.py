"""The codecs of one model: one pair per worker and cache dtype, made when first needed."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.cache_kinds import RefusedLayersError, UnknownLayersError, layer_kinds
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.directory import load_rank_artifact
from kvtc_vllm.artifact.identity import model_directory, model_identity
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import FORMAT_VERSION
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.lmcache.positions import Recognition
from kvtc_vllm.lmcache.ranks import Shard, layers_of_stage, shard_of, stage_layers
from kvtc_vllm.lmcache.settings import LMCacheSettings


@dataclass(frozen=True)
class RankCodecs:
    """What codes the chunks of one worker."""

    kvtc: TransformCodec
    raw: ChunkCodec
    recognition: Recognition


class CodecBook:
    """Codecs by LMCache's kv_rank and cache dtype. Thread-safe.

    Raises ArtifactError at construction if the model can't be found, or has latents. The RoPE
    tables are those of the artifact: a server has no live model to ask. An engine that rotates keys
    otherwise (another rope_scaling, say) is not recognised.
    """

    def __init__(self, settings: LMCacheSettings) -> None:
        self._settings = settings
        self._identity = model_identity(settings.model)
        _check_kinds(settings.model)
        self._page_order = _page_order(settings)
        self._lock = threading.Lock()
        self._codecs: dict[tuple[int, torch.dtype], RankCodecs] = {}
        self._fingerprints: dict[int, str] = {}

    def of(self, kv_rank: int, dtype: torch.dtype) -> RankCodecs:
        """Codecs of one worker. Raises ArtifactError if no artifact fits it."""
        shard = shard_of(kv_rank, self._settings.pipeline_ranks)
        with self._lock:
            found = self._codecs.get((kv_rank, dtype))
            if found is None:
                found = self._codecs[kv_rank, dtype] = self._load(shard, dtype)
            return found

    def fingerprint(self, kv_rank: int) -> str:
        """Names the artifact of this worker and its peers, and how chunks are read: 16 hexadecimal
        digits.

        Raises ArtifactError if there is none.
        """
        tp_size = shard_of(kv_rank, self._settings.pipeline_ranks).tp_size
        with self._lock:
            if tp_size not in self._fingerprints:
                card = load_card(find_artifact(self._settings, tp_size))
                facts = "".join(card.fingerprints) + self._page_order
                self._fingerprints[tp_size] = xxhash.xxh3_64_hexdigest(facts.encode())
            return self._fingerprints[tp_size]

    def _load(self, shard: Shard, dtype: torch.dtype) -> RankCodecs:
        settings = self._settings
        directory = find_artifact(settings, shard.tp_size)
        artifact, _, probe = load_rank_artifact(directory, shard.tp_rank)
        if settings.pipeline_ranks > 1:
            layers = artifact.geometry.num_layers
            first, end = stage_layers(layers, settings.pipeline_ranks, shard.pp_rank)
            artifact = layers_of_stage(artifact, first, end)
            probe = replace(probe, k=probe.k[:, first:end], v=probe.v[:, first:end])
        digest = xxhash.xxh3_128()
        facts = (FORMAT_VERSION, "lmcache", self._identity.identity, str(dtype), shard)
        digest.update(repr(facts).encode())
        digest.update(artifact.fingerprint)
        for rope in artifact.ropes:
            digest.update(rope.fingerprint())
        digest.update(self._page_order.encode())
        identity = digest.digest()
        codec = open_codec(
            artifact.codec,
            dtype,
            artifact=artifact,
            ratio=settings.ratio,
            identity=identity,
            deflate_level=settings.deflate_level,
        )
        raw = open_codec("raw", dtype, geometry=artifact.geometry, identity=identity)
        return RankCodecs(codec, raw, Recognition(artifact, probe))


def _page_order(settings: LMCacheSettings) -> str:
    """What a setting says of the order of bytes in a chunk; empty for the packed one.

    A chunk that was read in a wrong order is kept raw, and is itself again in that order only.
    """
    if settings.page_order == "packed":
        return ""
    return f" {settings.page_order} {settings.block_size}"


def _check_kinds(model: str) -> None:
    """Raise ArtifactError for latents, whose chunks would be taken for K and V of one head, and
    for what an engine refuses."""
    config = json.loads((model_directory(model) / "config.json").read_text())
    try:
        kinds = layer_kinds(config)
    except RefusedLayersError as error:
        raise ArtifactError(f"model={model!r}: {error}") from error
    except UnknownLayersError:
        return  # an artifact of it decides
    if any(kind.kind == "latent" for kind in kinds):
        raise ArtifactError(
            f"model={model!r} has multi-head latent attention (MLA), whose chunks KVTC does not "
            "read below LMCache; serve it with KVTCConnector"
        )


def find_artifact(settings: LMCacheSettings, tp_size: int) -> Path:
    """Directory of the artifact that fits the settings. Raises ArtifactError."""
    if tp_size < 1:
        raise ArtifactError(f"no artifact for tensor parallel size {tp_size}")
    return registry.find(
        model_identity(settings.model),
        tp_size=tp_size,
        ratio=settings.ratio,
        model_name=settings.model,
        artifact=settings.artifact,
        registries=settings.registry,
        groups=(),
    )
