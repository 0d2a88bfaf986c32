"""What `kvtc eval --quick` runs: every method on few short prompts, for a first look."""

from __future__ import annotations

from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.cachegen_lmcache import CacheGenLmcache
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.recall import RECALLS

COUNT = 4
"""Prompts of each task: intervals are wide."""
TASKS = "prose:400,litm:400"
DATA_TASKS = "essays:400,kv-retrieval:416"
_OURS = ("kvtc-8x", "kvtc-16x", "kvtc-32x")
_COMPOSED = ("fp8-e4m3+kvtc-16x", "snapkv/keep=0.5+kvtc-16x")


def quick_methods() -> list[str]:
    """Our codec, every registered method as it is, and one of each kind below our codec.

    CacheGen in LMCache's version is left out: it is slow.
    """
    baselines = [name for name in BASELINES if name != CacheGenLmcache.name]
    return [*_OURS, *baselines, *EVICTIONS, *RECALLS, *_COMPOSED]
