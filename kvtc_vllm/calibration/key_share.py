"""Division of a rank's bits between keys and values.

The paper codes both at the target ratio. What a model bears differs: `kvtc eval MODEL
--ablation keys-values` measures it at equal bytes.
"""

from __future__ import annotations

from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind
from kvtc_vllm.codec.errors import ArtifactError


def own_ratio(geometry: Geometry, group: int, kind: Kind, ratio: float, share: float) -> float:
    """Ratio of K or V of a layer group, where both together have `ratio` and K `share` of the bits.

    share: above 0, below 1. Raises ArtifactError if that would take K or V below 1x: more
    bits than the cache has.
    """
    if not 0 < share < 1:
        raise ArtifactError(f"key share {share} must be above 0 and below 1")
    both = sum(geometry.row_size(group, k) for k in KINDS)
    part = share if kind == "k" else 1 - share
    own = ratio * geometry.row_size(group, kind) / (part * both)
    if own < 1:
        raise ArtifactError(
            f"a key share of {share:g} at ratio {ratio:g} gives {kind.upper()} more bits than "
            "the cache has; take a share nearer to 0.5, or leave out low ratios"
        )
    return own
