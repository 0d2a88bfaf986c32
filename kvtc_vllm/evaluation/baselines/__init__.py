"""Storage methods of other papers and products, by name. One file per method, one row here."""

from __future__ import annotations

from kvtc_vllm.evaluation.baselines.base import Baseline
from kvtc_vllm.evaluation.baselines.cachegen import CacheGen
from kvtc_vllm.evaluation.baselines.cachegen_lmcache import CacheGenLmcache
from kvtc_vllm.evaluation.baselines.deltakv import DeltaKV
from kvtc_vllm.evaluation.baselines.fp8 import Fp8
from kvtc_vllm.evaluation.baselines.gear import Gear, Gear4
from kvtc_vllm.evaluation.baselines.joint_fusion import JointFusion, JointFusionStrict
from kvtc_vllm.evaluation.baselines.kivi import Kivi, Kivi4
from kvtc_vllm.evaluation.baselines.low_rank_projection import Lorc, ReCalKV
from kvtc_vllm.evaluation.baselines.quantspec import QuantSpec4, QuantSpec8
from kvtc_vllm.evaluation.baselines.swan import Swan8, Swan16
from kvtc_vllm.evaluation.baselines.think import Think, ThinkKivi
from kvtc_vllm.evaluation.baselines.turboquant import TurboQuant3, TurboQuant4
from kvtc_vllm.evaluation.baselines.turboquant_outliers import TurboQuant25, TurboQuant35
from kvtc_vllm.evaluation.baselines.xkv import Xkv

_METHODS: tuple[type[Baseline], ...] = (
    Fp8,
    Kivi,
    Kivi4,
    Gear,
    Gear4,
    Xkv,
    CacheGen,
    CacheGenLmcache,
    JointFusion,
    JointFusionStrict,
    TurboQuant4,
    TurboQuant3,
    TurboQuant35,
    TurboQuant25,
    QuantSpec8,
    QuantSpec4,
    Think,
    ThinkKivi,
    Swan16,
    Swan8,
    Lorc,
    ReCalKV,
    DeltaKV,
)
BASELINES: dict[str, type[Baseline]] = {method.name: method for method in _METHODS}

__all__ = ["BASELINES", "Baseline"]
