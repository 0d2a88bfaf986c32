"""Exceptions of the codec. Data errors never escape as anything else."""


class CodecError(Exception):
    """Base class of every error that the codec raises on purpose."""


class ContainerError(CodecError):
    """A blob is corrupt, truncated, foreign, or does not fit the artifact.

    Callers at run time treat it as a cache miss. `reason` is a short stable
    word used as a metric label: "truncated", "magic", "version", "checksum",
    "geometry", "fingerprint", "bounds" or "entropy".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class ArtifactError(CodecError):
    """An artifact is missing, malformed, or does not fit the model."""
