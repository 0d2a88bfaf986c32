"""How much what a model predicts depends on each layer's K and V, and what rows are weighted by.

PCA and bit allocation minimise squared error, as if an error of one cost the same in every layer.
It does not: mean squared gradients of a continuation differ between layers by a factor of
hundreds. Rows multiplied by the square root of those gradients have errors that do cost the same,
in K as in V, so that all layers compete for one budget of bits.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import torch

from kvtc_vllm.codec.artifact import Geometry, Kind
from kvtc_vllm.codec.errors import ArtifactError

SENSITIVITY_NAME = "sensitivity.json"
SENSITIVITY_VERSION = 1

LEAST_WEIGHT = 0.02
"""No layer is weighted less than this, the root mean square of all weights being 1.

Below it a layer hardly counts. A layer that the sample never reached would have a weight of
0, which cannot be undone."""


class SensitivitySource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What gradients were taken on.

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


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mean squared gradient per element, one number per layer.

    Of the log-likelihood of tokens sampled from the model, with respect to the cached K and V of
    the prefix before them; nats squared per squared unit of the cache.

    keys, values: per layer, none negative.
    documents: numbers of the calibration documents, as in a spool's docs.bin.
    tokens: of prefixes, over which was averaged.
    source: see there.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]
    documents: tuple[int, ...]
    tokens: int
    source: SensitivitySource
    version: int = SENSITIVITY_VERSION

    def layer_weights(self) -> dict[Kind, torch.Tensor]:
        """Of rows, float32 [L] for K and for V. Their mean square is 1, `LEAST_WEIGHT` aside.

        The common factor changes no error that anything is compared by, and keeps coefficients
        in the range of float16.
        """
        squares = torch.tensor((self.keys, self.values), dtype=torch.float64)
        weights = (squares / squares.mean()).sqrt().clamp_min(LEAST_WEIGHT).float()
        return {"k": weights[0], "v": weights[1]}


def row_weights(
    layer_weights: torch.Tensor, geometry: Geometry, group: int, kind: Kind
) -> torch.Tensor:
    """Weights of the elements of a row: float32 [p]. layer_weights: float32 [L], of this kind."""
    first, end = geometry.layer_groups[group]
    return layer_weights[first:end].repeat_interleave(
        geometry.row_size(group, kind) // (end - first)
    )


def save_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write it as JSON, whole or not at all."""
    temporary = path.with_suffix(".writing")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(sensitivity), indent=1) + b"\n")
    temporary.replace(path)


def load_sensitivity(path: Path, num_layers: int) -> Sensitivity:
    """Read and check what `save_sensitivity` wrote.

    Raises ArtifactError, naming file and field, for one that is missing, malformed or of another
    number of layers.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Sensitivity)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}; kvtc calibrate --sensitivity gradient --spool DIR leaves "
            f"DIR/{SENSITIVITY_NAME}"
        ) from error
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if found.version != SENSITIVITY_VERSION:
        raise ArtifactError(
            f"{path}: version is {found.version}, this program reads {SENSITIVITY_VERSION}"
        )
    for name, numbers in (("keys", found.keys), ("values", found.values)):
        if len(numbers) != num_layers:
            raise ArtifactError(
                f"{path}: {name} has {len(numbers)} numbers, the model has {num_layers} layers"
            )
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ArtifactError(f"{path}: {name} has a number that is negative or not finite")
    if not any((*found.keys, *found.values)):
        raise ArtifactError(f"{path}: keys and values are all 0; nothing can be weighted by them")
    return found
