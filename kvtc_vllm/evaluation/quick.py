"""What `kvtc eval --quick` runs: every method on few short prompts, for a first look."""

from __future__ import annotations

from collections.abc import Sequence

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import CODECS
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.cachegen_lmcache import CacheGenLmcache
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.recall import RECALLS

COUNT = 4
"""Prompts of each task: intervals are wide."""
TASKS = "prose:400,litm:400"
DATA_TASKS = "essays:400,kv-retrieval:416"
RATIOS = (8, 16, 32)
"""Of our codecs, as far as there are plans."""
_BELOW_RATIO = 16
_BELOW = ("fp8-e4m3", "snapkv/keep=0.5")
"""One of each kind that goes below our codec."""


def quick_methods(ours: Sequence[str]) -> list[str]:
    """Our codecs, every registered method as it is, and one of each kind below one of our codecs.

    ours: as `our_methods` gives them; none: the other methods alone. CacheGen in LMCache's version
    is left out: it is slow.
    """
    baselines = [name for name in BASELINES if name != CacheGenLmcache.name]
    middle = [name for name in ours if name.endswith(f"-{_BELOW_RATIO}x")] or list(ours)
    composed = [f"{below}+{middle[0]}" for below in _BELOW] if middle else []
    return [*ours, *baselines, *EVICTIONS, *RECALLS, *composed]


def our_methods(model: str, artifact: str | None = None) -> list[str]:
    """Our codecs at those of `RATIOS` for which an artifact has a plan, as methods.

    artifact: directory of the one to use; None: what the registry has. Raises ArtifactError if the
    model can't be read.
    """
    identity = model_identity(model)
    found = []
    for codec in (name for name, spec in CODECS.items() if spec.needs_artifact):
        for ratio in RATIOS:
            try:
                registry.find(identity, 1, ratio, model_name=model, codec=codec, artifact=artifact)
            except ArtifactError:
                continue
            found.append(f"{codec}-{ratio}x")
    return found
