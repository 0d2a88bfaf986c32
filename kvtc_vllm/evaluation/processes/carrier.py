"""The method that an engine runs when several share its exact passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.artifact.rank_file import rank_file_name
from kvtc_vllm.evaluation.methods import Method
from kvtc_vllm.evaluation.processes.profiles import with_profile

SHARED = "shared"


def carrier(methods: Sequence[Method], model: str, directory: Path) -> Method:
    """What stores exact chunks and makes the round trips of `methods` (`replay/round_trips.py`).

    All of them can share with the first (`Method.can_share`). directory: for what is fitted once
    per model.
    """
    trips = {m.name: _override(with_profile(m, model, directory), model) for m in methods}
    return replace(
        methods[0],
        name=SHARED,
        codec="raw",
        plan="bit-exact",
        ratio=None,
        artifact=None,
        override={"round_trips": trips, "sixteen_bits": methods[0].sixteen_bits},
    )


def _override(method: Method, model: str) -> dict[str, Any]:
    """Fields of `CodecOverride` for a method: our codec too takes the codec's place."""
    if method.ratio is None:
        return method.override
    rank_file = artifact_of(method, model) / rank_file_name(0, 1)
    override = {"variant": "unchanged", "artifact": str(rank_file), "ratio": method.ratio}
    return override if method.below is None else {**override, "below": method.below}


def artifact_of(method: Method, model: str) -> Path:
    """Directory of the artifact of a method that codes with ours. Raises ArtifactError."""
    assert method.ratio is not None
    return registry.find(
        model_identity(model),
        1,
        method.ratio,
        model_name=model,
        codec=method.codec,
        artifact=method.artifact,
    )


def alone(method: Method, model: str, directory: Path) -> Method:
    """The method as an engine of its own runs it. directory: as in `carrier`."""
    method = with_profile(method, model, directory)
    if method.below is None:
        return method
    return replace(
        method, codec="raw", ratio=None, artifact=None, override=_override(method, model)
    )
