"""One rank of an artifact as a safetensors file.

Tensors, for every layer group g and each of its sections: k and v, or kv alone:

    {name}{g}.mean     float32 [p]
    {name}{g}.basis    float16 [p, r]
    {name}{g}.errors   float64 [R, 3]: target ratio, predicted and held-out error
    {name}{g}.plan{j}  int32 [n, 3]: start, size, type id of each stored group; j < R
    {name}{g}.weights  float32 [p], only where a fit weighs elements
    rope{i}            the model's cos/sin table in its own dtype
    probe.k, probe.v   float16 [n, L, H, D]; probe.positions int32 [n]

Instead of plan{j} an artifact of another codec has the tensors of that codec's section coders.
Beside them lies a `RankHeader` as JSON under the metadata key "kvtc". Nothing read here is
trusted: shapes are compared with the geometry before a tensor is loaded, and
the fingerprint is computed again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kvtc_vllm.artifact.card import FORMAT_VERSION, UNNAMED_CODEC
from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.codec.artifact import (
    APART,
    PAIRED,
    Geometry,
    RankArtifact,
    SectionBasis,
    SectionKey,
    SectionName,
)
from kvtc_vllm.codec.container import MAX_SINK_TOKENS
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.registry import CODECS, ArtifactRules
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.section_coder import SectionCoder
from kvtc_vllm.codec.sink_rule import SinkRule

PROBE_TOKENS = 128

_METADATA_KEY = "kvtc"
_ROPE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Probe:
    """Up to 128 held-out tokens of one document, in order: a server tests itself on them at start.

    k: float16 [n, L, H, D] pre-RoPE. v: float16 [n, L, H, Dv]. positions:
    int32 [n], ascending, not necessarily consecutive: where the tokens stood.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor


class RankHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of a rank file that is not tensors.

    rank, ranks: which of how many tensor-parallel ranks.
    fingerprint: hex, see `kvtc_vllm.artifact.fingerprint`.
    geometry: shape of the rank's cache.
    sink_tokens: first positions that are stored exactly.
    layer_rope: per layer the number of its table `rope{i}`, or None.
    rope_neox: per table whether it rotates pairs (i, i + rotary / 2).
    codec: not named for version 1, "kvtc".
    sink_rule: not there if the model has no sinks beyond the first positions.
    """

    rank: int
    ranks: int
    fingerprint: str
    geometry: Geometry
    sink_tokens: int
    layer_rope: tuple[int | None, ...]
    rope_neox: tuple[bool, ...]
    codec: str | msgspec.UnsetType = msgspec.UNSET
    sink_rule: SinkRule | msgspec.UnsetType = msgspec.UNSET
    format_version: int = FORMAT_VERSION


def rank_file_name(rank: int, ranks: int) -> str:
    """Such as "rank0of2.safetensors"."""
    return f"rank{rank}of{ranks}.safetensors"


def write_rank_file(
    path: Path, artifact: RankArtifact, probe: Probe, rank: int, ranks: int
) -> None:
    """Write one rank. Held-out errors must be there for every plan."""
    tensors: dict[str, torch.Tensor] = {
        "probe.k": probe.k,
        "probe.v": probe.v,
        "probe.positions": probe.positions,
    }
    for i, rope in enumerate(artifact.ropes):
        tensors[f"rope{i}"] = rope.cos_sin
    for (group, kind), section in artifact.sections.items():
        name = f"{kind}{group}"
        tensors[f"{name}.mean"] = section.mean
        tensors[f"{name}.basis"] = section.basis
        if section.weights is not None:
            tensors[f"{name}.weights"] = section.weights
        ratios = sorted(section.plans)
        tensors[f"{name}.errors"] = torch.tensor(
            [[r, section.plans[r].expected_error, section.heldout_error[r]] for r in ratios],
            dtype=torch.float64,
        )
        for j, ratio in enumerate(ratios):
            for own_name, tensor in section.plans[ratio].tensors().items():
                tensors[f"{name}.{own_name}{j}"] = tensor
    header = RankHeader(
        rank=rank,
        ranks=ranks,
        fingerprint=artifact.fingerprint.hex(),
        geometry=artifact.geometry,
        sink_tokens=artifact.sink_tokens,
        layer_rope=artifact.layer_rope,
        rope_neox=tuple(rope.neox for rope in artifact.ropes),
        codec=msgspec.UNSET if artifact.codec == UNNAMED_CODEC else artifact.codec,
        sink_rule=msgspec.UNSET if artifact.sink_rule is None else artifact.sink_rule,
    )
    # safetensors refuses views and tensors that share memory.
    owned = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save_file(owned, path, metadata={_METADATA_KEY: msgspec.json.encode(header).decode()})


def read_rank_file(path: Path, rank: int, ranks: int) -> tuple[RankArtifact, Probe]:
    """Read and check one rank.

    Raises ArtifactError, naming the file and the field, for anything missing,
    malformed, out of bounds, or not matching the stored fingerprint.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; the artifact has no rank {rank} of {ranks}")
    try:
        with safe_open(path, framework="pt") as file:
            return _RankReader(path, file).read(rank, ranks)
    except (
        OSError,
        SafetensorError,
        msgspec.MsgspecError,
        ValueError,
        RecursionError,
    ) as error:
        raise ArtifactError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _CoderTensors:
    """The `CoderTensors` of one plan. place: "k0.{}2", to be filled with a tensor's own name."""

    left: set[str]
    read: Callable[[str, tuple[str, ...], tuple[int | None, ...]], torch.Tensor]
    wrong: Callable[[str, str], ArtifactError]
    place: str

    def has(self, name: str) -> bool:
        return self.place.format(name) in self.left

    def load(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> torch.Tensor:
        return self.read(self.place.format(name), dtypes, shape)

    def error(self, name: str, problem: str) -> ArtifactError:
        return self.wrong(self.place.format(name), problem)


class _RankReader:
    """Reads one open file; every problem is an ArtifactError naming file and field."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file
        self._left = set(file.keys())

    def read(self, rank: int, ranks: int) -> tuple[RankArtifact, Probe]:
        metadata = self._file.metadata() or {}
        if _METADATA_KEY not in metadata:
            raise self._error("metadata", f'has no "{_METADATA_KEY}"; this is not a rank file')
        header = msgspec.json.decode(metadata[_METADATA_KEY], type=RankHeader)
        if header.format_version != FORMAT_VERSION:
            raise self._error(
                "format_version", f"is {header.format_version}, this program reads {FORMAT_VERSION}"
            )
        if (header.rank, header.ranks) != (rank, ranks):
            raise self._error(
                "rank", f"is {header.rank} of {header.ranks}, expected {rank} of {ranks}"
            )
        if not 0 <= header.sink_tokens <= MAX_SINK_TOKENS:
            raise self._error(
                "sink_tokens", f"is {header.sink_tokens}, 0 to {MAX_SINK_TOKENS} are right"
            )
        codec = UNNAMED_CODEC if header.codec is msgspec.UNSET else header.codec
        spec = CODECS.get(codec)
        if spec is None or spec.rules is None:
            raise self._error("codec", f"is {codec!r}, whose artifacts this program does not know")
        rules = spec.rules
        geometry = header.geometry
        sink_rule = None if header.sink_rule is msgspec.UNSET else header.sink_rule
        if sink_rule is not None and sink_rule.layers[-1] >= geometry.num_layers:
            raise self._error(
                "sink_rule",
                f"names layer {sink_rule.layers[-1]}, the model has {geometry.num_layers} layers",
            )
        ropes = self._ropes(header, geometry)
        names = self._section_names(codec, rules)
        sections: dict[SectionKey, SectionBasis] = {
            (group, name): self._section(geometry, group, name, rules)
            for group, name in geometry.section_keys(names)
        }
        wrong = rules.wrong_sections(sections)
        if wrong is not None:
            raise ArtifactError(f"{self._path}: {wrong}")
        probe = self._probe(geometry, ropes)
        if self._left:
            raise self._error(min(self._left), "is not a tensor of this format")
        fingerprint = artifact_fingerprint(geometry, sections, header.sink_tokens, sink_rule)
        if fingerprint.hex() != header.fingerprint:
            raise self._error(
                "fingerprint",
                f"is {header.fingerprint}, the contents have {fingerprint.hex()}; "
                "the file is damaged or was edited",
            )
        artifact = RankArtifact(
            geometry=geometry,
            sections=sections,
            ropes=ropes,
            layer_rope=header.layer_rope,
            fingerprint=fingerprint,
            sink_tokens=header.sink_tokens,
            codec=codec,
            sink_rule=sink_rule,
        )
        return artifact, probe

    def _error(self, field: str, problem: str) -> ArtifactError:
        return ArtifactError(f"{self._path}: {field} {problem}")

    def _load(
        self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> torch.Tensor:
        """Load a finite tensor of the given dtype and shape; None is any length."""
        if name not in self._left:
            raise self._error(name, "is missing")
        self._left.discard(name)
        entry = self._file.get_slice(name)
        found = tuple(entry.get_shape())
        fits = len(found) == len(shape) and all(
            want is None or have == want for have, want in zip(found, shape, strict=True)
        )
        if entry.get_dtype() not in dtypes or not fits:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise self._error(
                name, f"is {entry.get_dtype()} {found}, expected {dtypes[0]} ({wanted})"
            )
        tensor: torch.Tensor = self._file.get_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise self._error(name, "holds NaN or infinity")
        return tensor

    def _ropes(self, header: RankHeader, geometry: Geometry) -> tuple[Rope, ...]:
        ropes = []
        for i, neox in enumerate(header.rope_neox):
            table = self._load(f"rope{i}", _ROPE_DTYPES, (None, None))
            width = table.shape[1]
            if table.shape[0] < 1 or width % 2 or not 2 <= width <= geometry.head_size:
                raise self._error(
                    f"rope{i}",
                    f"has shape {tuple(table.shape)}; rows must be there and the width even "
                    f"and at most the head size {geometry.head_size}",
                )
            ropes.append(Rope(table, neox))
        return tuple(ropes)

    def _section_names(self, codec: str, rules: ArtifactRules) -> tuple[SectionName, ...]:
        """What the sections of every layer group are."""
        pairs, apart = (
            sorted(name for name in self._left if re.fullmatch(pattern, name))
            for pattern in (r"kv\d+\.mean", r"[kv]\d+\.mean")
        )
        if not pairs:
            return APART
        if not rules.pairs:
            raise self._error(
                pairs[0], f"is of K and V together; codec {codec!r} has a basis each for K and V"
            )
        if apart:
            raise self._error(
                pairs[0],
                f"is of K and V together, and {apart[0]} is of one of them; all layer groups of an "
                "artifact have pairs, or none",
            )
        return PAIRED

    def _section(
        self, geometry: Geometry, group: int, section: SectionName, rules: ArtifactRules
    ) -> SectionBasis:
        name = f"{section}{group}"
        p = geometry.row_size(group, section)
        mean = self._load(f"{name}.mean", ("F32",), (p,))
        basis = self._load(f"{name}.basis", ("F16",), (p, None))
        if not 1 <= basis.shape[1] <= p:
            raise self._error(f"{name}.basis", f"has {basis.shape[1]} columns, 1 to {p} are right")
        errors = self._load(f"{name}.errors", ("F64",), (None, 3))
        ratios = errors[:, 0].tolist()
        if not ratios or any(r < 1 for r in ratios) or any(a >= b for a, b in pairwise(ratios)):
            raise self._error(f"{name}.errors", f"has ratios {ratios}; rising ones >= 1 are right")
        if float(errors.min()) < 0:
            raise self._error(f"{name}.errors", "has a negative error")
        weights = None
        if f"{name}.weights" in self._left:
            weights = self._load(f"{name}.weights", ("F32",), (p,))
            if float(weights.min()) <= 0:
                raise self._error(f"{name}.weights", "has one that is not positive")
        plans: dict[float, SectionCoder] = {}
        heldout: dict[float, float] = {}
        for j, (ratio, predicted, measured) in enumerate(errors.tolist()):
            tensors = _CoderTensors(self._left, self._load, self._error, f"{name}.{{}}{j}")
            plans[ratio] = rules.read_coder(tensors, ratio, predicted, basis.shape[1])
            heldout[ratio] = measured
        return SectionBasis(mean, basis, plans, heldout, weights)

    def _probe(self, geometry: Geometry, ropes: tuple[Rope, ...]) -> Probe:
        positions = self._load("probe.positions", ("I32",), (None,))
        count = len(positions)
        limit = min((rope.max_positions for rope in ropes), default=math.inf)
        rising = all(a < b for a, b in pairwise(positions.tolist()))
        if not 1 <= count <= PROBE_TOKENS or not rising:
            raise self._error(
                "probe.positions", f"must be 1 to {PROBE_TOKENS} rising positions, has {count}"
            )
        if int(positions[0]) < 0 or int(positions[-1]) >= limit:
            raise self._error("probe.positions", f"leave the RoPE table of {limit} positions")
        lead = (count, geometry.num_layers, geometry.num_kv_heads)
        return Probe(
            k=self._load("probe.k", ("F16",), (*lead, geometry.head_size)),
            v=self._load("probe.v", ("F16",), (*lead, geometry.head_size_v)),
            positions=positions,
        )
