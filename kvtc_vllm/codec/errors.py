"""Exceptions of the codec. Data errors never escape as anything else."""

from __future__ import annotations

from typing import Literal, get_args

ContainerReason = Literal[
    "truncated",
    "magic",
    "version",
    "checksum",
    "geometry",
    "fingerprint",
    "bounds",
    "entropy",
    # The connector's own: there is no blob.
    "missing",
]
CONTAINER_REASONS: tuple[ContainerReason, ...] = get_args(ContainerReason)
"""All reasons of a `ContainerError`."""


class CodecError(Exception):
    """Base class of every error that the codec raises on purpose.

    Raised itself for a chunk that can't be coded. `reason` is a short stable word that callers
    decide by: "non_finite" (the chunk holds NaN or infinity), "range" (a value does not fit what
    the codec stores), "position" (outside the RoPE table), "size" (a length does not fit the
    container) or "ratio" (a blob can't be made smaller).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class ContainerError(CodecError):
    """A blob is corrupt, truncated, foreign, or does not fit the artifact.

    Callers at run time treat it as a cache miss. `reason` is a short stable
    word used as a metric label, one of `CONTAINER_REASONS`.
    """

    reason: ContainerReason

    def __init__(self, reason: ContainerReason, message: str) -> None:
        super().__init__(reason, message)

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ArtifactError(CodecError):
    """An artifact is missing, malformed, or does not fit the model. `reason` is "artifact"."""

    def __init__(self, message: str) -> None:
        super().__init__("artifact", message)
        self.args = (message,)
