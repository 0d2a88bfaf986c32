"""The bench's connector: ours, with something else in the place of the codec if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from kvtc_vllm.artifact.rank_file import read_rank_file
from kvtc_vllm.codec.codec import Coder
from kvtc_vllm.config import KVTCConfig, load_config
from kvtc_vllm.connector.connector import KVTCConnector
from kvtc_vllm.connector.layout import PagedLayout
from kvtc_vllm.connector.rotary import find_ropes
from kvtc_vllm.connector.startup import codec_geometry
from kvtc_vllm.connector.transfer import TorchTransfer
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.blob import BaselineCodec
from kvtc_vllm.evaluation.variants import VARIANTS, Base

NAME = "KVTCEvaluationConnector"
MODULE = "kvtc_vllm.evaluation.connector"


class Substitute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What takes the codec's place; nothing given: the codec stays.

    baseline: name in `BASELINES`. options: its keyword arguments, or what the variant
    takes. variant: name in `VARIANTS`, applied to the rank file `artifact` at `ratio`.
    """

    baseline: str | None = None
    variant: str | None = None
    artifact: str | None = None
    ratio: float | None = None
    options: dict[str, Any] = {}


class KVTCEvaluationConnector(KVTCConnector):
    """`KVTCConnector` with the key `evaluation` in its configuration."""

    def _read_config(self, extra: dict[str, Any]) -> KVTCConfig:
        self._substitute = msgspec.convert(extra.get("evaluation", {}), Substitute)
        return load_config({key: extra[key] for key in extra if key != "evaluation"})

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Start-up of a worker, then the exchange."""
        super().register_kv_caches(kv_caches)
        wanted, worker = self._substitute, self._live_worker
        layers = len(self._geometry.layer_names)
        geometry = codec_geometry(self._geometry, ((0, layers),))
        ropes, layer_rope = find_ropes(self._vllm_config, self._geometry.layer_names)
        if wanted.baseline is not None:
            per_layer = [None if index is None else ropes[index] for index in layer_rope]
            baseline = BASELINES[wanted.baseline](
                geometry, self._geometry.dtype, per_layer, **wanted.options
            )
            codec: Coder = BaselineCodec(baseline)
        elif wanted.variant is not None:
            assert wanted.artifact is not None
            assert wanted.ratio is not None
            artifact, _ = read_rank_file(Path(wanted.artifact), 0, 1)
            artifact = replace(artifact, ropes=ropes, layer_rope=layer_rope)
            base = Base(artifact, wanted.ratio, self._geometry.dtype, wanted.options)
            codec = VARIANTS[wanted.variant](base)
        else:
            return
        layout = PagedLayout(kv_caches, self._geometry)
        worker.exchange_transfer(TorchTransfer(layout, codec, self._config.chunk_tokens))
