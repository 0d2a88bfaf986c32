"""How much what a model predicts depends on its cached K and V, layer by layer, and the file of it.

Averages are over all tokens, and over ordinary ones alone: a few attention sinks hold most of the
energy of all gradients, so an average over all tokens is mostly theirs. Where a codec protects
sinks apart, what the other tokens say is what rows should be weighted by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import msgspec

from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.capture_record import CaptureRecord
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.sink_rule import SinkRule

SENSITIVITY_NAME = "sensitivity.json"
SENSITIVITY_VERSION = 2

Numbers = tuple[tuple[float, ...], ...]
"""Per layer, per KV head of all ranks."""


class SensitivitySource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What sensitivities were measured on.

    model: fingerprints of configuration and weights, see `kvtc_vllm.artifact.identity`.
    texts: hex of xxh3-128 of all text that was read.
    documents: how many were asked for.
    prefix_tokens, continuation_tokens: of each document, at most.
    sink_tokens: first positions, which are left out of the average.
    max_len, heldout_fraction, seed: decide how text was cut into documents, and which were drawn.
    """

    model: str
    texts: str
    documents: int
    prefix_tokens: int
    continuation_tokens: int
    sink_tokens: int
    max_len: int
    heldout_fraction: float
    seed: int


class Average(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean squared gradient per element over some tokens.

    Of the log-likelihood of tokens sampled from the model, with respect to the cached K and V of
    the prefix before them; nats squared per squared unit of the cache.

    keys, values: per layer, per KV head of all ranks, none negative; one number per layer where
    heads were not told apart.
    tokens: of prefixes, over which was averaged.
    """

    keys: Numbers
    values: Numbers
    tokens: int


class Marked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tokens that are left out of the ordinary ones.

    rule: that marked them, over the heads of all ranks.
    share: of the tokens. energy: their share of the sum of all squared gradients.
    """

    rule: SinkRule
    share: float
    energy: float


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an error in the cache costs, by layer.

    method: "gradient": squared gradients. "probe": twice the KL divergence that noise in the cache
    caused, over the energy of the noise; to second order the same number.
    all_tokens: over all tokens past the first.
    ordinary: without the marked ones; None: the model has no floating sinks.
    marked: see there; None as above.
    documents: numbers of the calibration documents, as in a spool's docs.bin.
    source: see there.
    replayed_in: of a probe, dtype of its replays.
    """

    method: Literal["gradient", "probe"] = "gradient"
    all_tokens: Average
    ordinary: Average | None = None
    marked: Marked | None = None
    documents: tuple[int, ...]
    source: SensitivitySource
    replayed_in: Literal["float32"] | None = None
    version: int = SENSITIVITY_VERSION


class SensitivityMeasure(ABC):
    """How `kvtc calibrate` measures sensitivities."""

    @abstractmethod
    def check(self) -> None:
        """Raise ArtifactError if it cannot be done; asked before a capture, which takes long."""

    @abstractmethod
    def measure(self, record: CaptureRecord, spool: Path) -> Path:
        """Leave the file in the spool of a finished capture, unless it is there; its path."""


def is_measured(
    path: Path,
    num_layers: int,
    kv_heads: int,
    method: str,
    source: SensitivitySource,
    rule: SinkRule | None,
) -> bool:
    """Whether a file holds what measuring again would find; not one that cannot be read."""
    try:
        found = load_sensitivity(path, num_layers, kv_heads)
    except ArtifactError:
        return False
    marked_by = None if found.marked is None else found.marked.rule
    return (found.method, found.source, marked_by) == (method, source, rule)


def save_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write it as JSON, whole or not at all."""
    with replacing(path) as unfinished:
        content = msgspec.json.format(msgspec.json.encode(sensitivity), indent=1)
        unfinished.write_bytes(content + b"\n")


def load_sensitivity(path: Path, num_layers: int, kv_heads: int) -> Sensitivity:
    """Read and check what `save_sensitivity` wrote.

    kv_heads: per layer, of all ranks. Raises ArtifactError, naming file and field, for one that is
    missing, malformed, of another version, or of another number of layers or heads.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}; kvtc calibrate --sensitivity gradient --spool DIR leaves "
            f"DIR/{SENSITIVITY_NAME}"
        ) from error
    try:
        # The version comes first, or another one would be reported as an unknown field.
        version = msgspec.json.decode(data, type=_Versioned).version
        if version != SENSITIVITY_VERSION:
            raise ArtifactError(
                f"{path}: version is {version}, this program reads {SENSITIVITY_VERSION}; measure "
                "again with kvtc calibrate --sensitivity"
            )
        found = msgspec.json.decode(data, type=Sensitivity)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if found.method == "probe" and found.replayed_in is None:
        raise ArtifactError(
            f"{path}: replayed_in is missing: probed in the model's own dtype, which measures "
            "rounding; measure again with kvtc calibrate --sensitivity probe"
        )
    if (found.ordinary is None) != (found.marked is None):
        raise ArtifactError(f"{path}: ordinary and marked go together; one of them is missing")
    for name, average in (("all_tokens", found.all_tokens), ("ordinary", found.ordinary)):
        if average is not None:
            _check(f"{path}: {name}", average, num_layers, kv_heads)
    return found


def _check(where: str, average: Average, num_layers: int, kv_heads: int) -> None:
    widths = {len(row) for numbers in (average.keys, average.values) for row in numbers}
    for name, numbers in (("keys", average.keys), ("values", average.values)):
        if len(numbers) != num_layers:
            raise ArtifactError(
                f"{where}.{name} has {len(numbers)} layers, the model has {num_layers}"
            )
        if not all(math.isfinite(x) and x >= 0 for row in numbers for x in row):
            raise ArtifactError(f"{where}.{name} has a number that is negative or not finite")
    if widths not in ({1}, {kv_heads}):
        raise ArtifactError(
            f"{where} has {sorted(widths)} numbers per layer; 1 is right, or {kv_heads}, one per "
            "KV head"
        )
    if not any(x for numbers in (average.keys, average.values) for row in numbers for x in row):
        raise ArtifactError(f"{where}: keys and values are all 0; nothing can be weighted by them")


class _Versioned(msgspec.Struct):
    version: int = 0
