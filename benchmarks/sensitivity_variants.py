"""The variants that the ablations of sensitivity compare, their fits and their codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash

from benchmarks.sensitivity import CHUNK
from benchmarks.sensitivity_gradients import (
    KINDS_OF_TEXT,
    RETRIEVAL,
    TEXTS,
    Gradients,
    of_numbers,
    roots,
    weights,
)
from kvtc_vllm.artifact.rank_file import read_rank_file, write_rank_file
from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.cache_replay import round_trip
from kvtc_vllm.calibration.fit import fit_rank
from kvtc_vllm.calibration.fit_settings import FitSettings
from kvtc_vllm.calibration.sensitivity import load_sensitivity
from kvtc_vllm.calibration.spool import SpoolReader
from kvtc_vllm.calibration.weights import RowWeights
from kvtc_vllm.codec.artifact import Kind, RankArtifact, SectionName
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.registry import open_codec
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.transform import rows_from_keys

HELDOUT_ROWS = 1024
RANK_CAP = 1024
"""Columns of a basis: more than plans of 32x read of this model's rows."""
TEXT_DOCUMENTS = 20
"""Of texts, in the set that everything else is compared with."""


@dataclass(frozen=True)
class Material:
    """What variants are made of. rows: to fit. probe: file of a probe."""

    reader: SpoolReader
    gradients: Sequence[Gradients]
    rule: SinkRule | None
    rows: int
    probe: Path | None

    def texts(self, kinds: Sequence[str] = TEXTS, most: int = TEXT_DOCUMENTS) -> list[Gradients]:
        """The first documents of these kinds, kinds in turn."""
        return [g for g in self.gradients if g.kind in kinds][:most]

    def weights(self, documents: Sequence[Gradients], **how: bool | str) -> RowWeights:
        """Of all heads; see `sensitivity_gradients.weights`."""
        return weights(documents, self.reader.geometry, **how)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Variant:
    """One way to weigh rows. None: as the paper, K and V at the same ratio.

    matrices: instead of weights, float32 [2, L, H, D, D]. exact_sinks: marked tokens in 16 bits.
    """

    name: str
    about: str
    weights: RowWeights | None = None
    matrices: torch.Tensor | None = None
    exact_sinks: bool = False


@dataclass
class Stored:
    """What came back of a prefix. bytes: of its blobs; raw: of itself."""

    k: torch.Tensor
    v: torch.Tensor
    bytes: int
    raw: int
    kl: float = 0.0
    agreed: float = 0.0

    def without_tensors(self) -> Stored:
        """The numbers alone."""
        return replace(self, k=torch.empty(0), v=torch.empty(0))


def metric_variants(material: Material) -> list[Variant]:
    texts = material.texts()
    count = f"{len(texts)} documents of essays, maths and code"
    return [
        Variant("none", "no weights"),
        Variant("layer", f"a weight per layer, {count}", material.weights(texts)),
        Variant("head", "a weight per layer and head", material.weights(texts, metric="head")),
        Variant("matrix", "a D x D matrix per layer and head", matrices=roots(texts)),
    ]


def method_variants(material: Material) -> list[Variant]:
    if material.probe is None:
        raise SystemExit("method: give --probe FILE")
    geometry = material.reader.geometry
    found = load_sensitivity(material.probe, geometry.num_layers, geometry.num_kv_heads)
    average = found.all_tokens
    probed = of_numbers(average.keys, average.values, average.tokens, "layer", geometry)
    return [
        Variant("gradient", "as layer", material.weights(material.texts())),
        Variant("probe", f"noise, {len(found.documents)} documents", probed),
    ]


def document_variants(material: Material) -> list[Variant]:
    return [
        Variant(f"{n} documents", "", material.weights(material.texts(most=n)))
        for n in (3, 6, 12, 20)
    ]


def retrieval_variants(material: Material) -> list[Variant]:
    texts, prompts = material.texts(), material.texts((RETRIEVAL,))
    return [
        Variant("texts", f"{len(texts)} documents", material.weights(texts)),
        Variant(
            "with retrieval",
            f"and {len(prompts)} prompts of key-value retrieval",
            material.weights([*texts, *prompts]),
        ),
        Variant("retrieval alone", "the prompts", material.weights(prompts)),
    ]


def domain_variants(material: Material) -> list[Variant]:
    each = {kind: material.texts((kind,)) for kind in TEXTS}
    return [
        Variant("all", "of each a third", material.weights(material.texts())),
        *(
            Variant(kind, f"{len(own)} documents", material.weights(own))
            for kind, own in each.items()
        ),
    ]


def token_variants(material: Material) -> list[Variant]:
    if material.rule is None:
        raise SystemExit("tokens: the spool's rows show no floating sinks")
    texts = material.texts()
    every, ordinary = material.weights(texts), material.weights(texts, ordinary=True)
    return [
        Variant("all", "weights of all tokens", every),
        Variant("ordinary", "weights of ordinary tokens", ordinary),
        Variant("all exact", "and sinks in 16 bits", every, exact_sinks=True),
        Variant("ordinary exact", "and sinks in 16 bits", ordinary, exact_sinks=True),
    ]


@dataclass(frozen=True)
class Ablation:
    """variants: made of the material. kinds: of text to report on."""

    variants: Callable[[Material], list[Variant]]
    kinds: Sequence[str]


PROSE_MATHS = ("essays", "maths")

ABLATIONS = {
    "metric": Ablation(metric_variants, (*PROSE_MATHS, RETRIEVAL)),
    "method": Ablation(method_variants, (*PROSE_MATHS, RETRIEVAL)),
    "documents": Ablation(document_variants, PROSE_MATHS),
    "retrieval": Ablation(retrieval_variants, (*PROSE_MATHS, RETRIEVAL)),
    "domains": Ablation(domain_variants, TEXTS),
    "tokens": Ablation(token_variants, KINDS_OF_TEXT),
}


class MatrixRows:
    """Rows times a matrix per layer and head; keys are not rotated."""

    def __init__(self, reader: SpoolReader, matrices: torch.Tensor) -> None:
        self._reader = reader
        self._matrices = {"k": matrices[0], "v": matrices[1]}
        self.positions, self.docs = reader.positions, reader.docs

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """As in the cache, hence not multiplied: [n, l, H, D]."""
        return self._reader.cache_rows(kind, index, first, end)

    def count(self, *, heldout: bool) -> int:
        """Number of training or held-out rows."""
        return self._reader.count(heldout=heldout)

    def select(
        self,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Numbers of rows."""
        return self._reader.select(heldout=heldout, limit=limit, generator=generator)

    def take(self, group: int, name: SectionName, index: torch.Tensor) -> torch.Tensor:
        """Rows of these numbers, multiplied: float32 [n, p]."""
        rows = self._reader.take(group, name, index)
        found = []
        for kind, part in self._reader.geometry.row_parts(group, name).items():
            matrices = self._matrices[kind]
            found.append(multiply(rows[:, part].reshape(len(rows), *matrices.shape[:3]), matrices))
        return torch.cat(found, dim=1)


def multiply(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """rows: float32 [n, L, H, D]; matrices: float32 [L, H, D, D]; gives [n, p]."""
    by_head = rows.permute(1, 2, 0, 3) @ matrices
    return by_head.permute(2, 0, 1, 3).flatten(1)


def fitted(
    variant: Variant, material: Material, ratios: Sequence[float], work: Path
) -> RankArtifact:
    """The artifact of a variant's fit, which is kept in `work`."""
    reader = material.reader
    geometry = reader.geometry
    digest = xxhash.xxh3_64(f"{material.rows} {list(ratios)}".encode())
    own_weights = variant.weights
    if variant.matrices is not None:
        digest.update(variant.matrices.numpy().tobytes())
        # Of one, for the budget that K and V share.
        ones = [[1.0]] * geometry.num_layers
        own_weights = of_numbers(ones, ones, 1, "layer", geometry)
    elif own_weights is not None:
        for of_kind in own_weights.of_heads().values():
            digest.update(of_kind.numpy().tobytes())
    path = work / f"fit-{digest.hexdigest()}.safetensors"
    if not path.exists():
        matrices = variant.matrices
        fit = fit_rank(
            reader if matrices is None else MatrixRows(reader, matrices),
            geometry,
            reader.ropes if matrices is None else (),
            reader.layer_rope if matrices is None else (None,) * geometry.num_layers,
            ratios,
            settings=FitSettings(
                weights=own_weights,
                train_rows=material.rows,
                heldout_rows=HELDOUT_ROWS,
                rank_cap=RANK_CAP,
            ),
        )
        print(f"{variant.name}: fitted in {fit.seconds:.0f} s", flush=True)
        with replacing(path) as unfinished:
            write_rank_file(unfinished, fit.artifact, reader.probe(), 0, 1)
    return read_rank_file(path, 0, 1)[0]


class Trip:
    """Prefixes through blobs and back."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def round_trip(self, k: torch.Tensor, v: torch.Tensor) -> Stored:
        """k, v: bfloat16 [T, L, H, D], K post-RoPE."""
        taken, back_k, back_v = round_trip(self._codec, k, v, CHUNK)
        return Stored(back_k, back_v, taken, k.nbytes + v.nbytes)


class MatrixTrip(Trip):
    """The same of rows times a matrix, as an artifact with matrices in it would do it.

    The first positions are stored exactly, so they come back as they were.
    """

    def __init__(
        self, codec: ChunkCodec, matrices: torch.Tensor, ropes: Sequence[Rope | None], sinks: int
    ) -> None:
        super().__init__(codec)
        self._matrices = matrices
        self._inverse = torch.linalg.inv(matrices.double()).float()
        self._ropes = ropes
        self._sinks = sinks

    def round_trip(self, k: torch.Tensor, v: torch.Tensor) -> Stored:
        """k, v: bfloat16 [T, L, H, D], K post-RoPE."""
        positions = torch.arange(len(k))
        plain = rows_from_keys(k, self._ropes, positions).view(k.shape)
        through = [
            multiply(x.float(), m).view(x.shape).bfloat16()
            for x, m in zip((plain, v), self._matrices, strict=True)
        ]
        stored = super().round_trip(*through)
        back = [
            multiply(x.float(), m).view(x.shape)
            for x, m in zip((stored.k, stored.v), self._inverse, strict=True)
        ]
        keys = torch.stack(
            [
                back[0][:, layer] if rope is None else rope.apply(back[0][:, layer], positions)
                for layer, rope in enumerate(self._ropes)
            ],
            dim=1,
        )
        stored.k, stored.v = keys.to(k.dtype), back[1].to(v.dtype)
        stored.k[: self._sinks], stored.v[: self._sinks] = k[: self._sinks], v[: self._sinks]
        return stored


def open_codec_of(
    variant: Variant, artifact: RankArtifact, ratio: float, material: Material
) -> Trip:
    """The codec that serves on a CPU, for a variant's artifact."""
    codec = open_codec("kvtc", torch.bfloat16, artifact=artifact, ratio=ratio)
    if variant.matrices is None:
        return Trip(codec)
    reader = material.reader
    ropes = [None if i is None else reader.ropes[i] for i in reader.layer_rope]
    return MatrixTrip(codec, variant.matrices, ropes, artifact.sink_tokens)


def keep_sinks(stored: Stored, k: torch.Tensor, v: torch.Tensor, rule: SinkRule | None) -> Stored:
    """Marked tokens as they were, for their 16 bits beside the blobs and a bit per token."""
    assert rule is not None
    marks = torch.cat([rule.marks(part) for part in v.split(CHUNK)])
    stored.k[marks], stored.v[marks] = k[marks], v[marks]
    stored.bytes += int(marks.sum()) * stored.raw // len(k) + len(k) // 8
    return stored
