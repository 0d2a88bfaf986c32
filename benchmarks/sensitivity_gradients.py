"""Squared gradients of documents of several kinds, kept by document: material for ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.differentiable import CacheShape, Differentiable, PrefixGradients
from kvtc_vllm.calibration.sensitivity import Average, Sensitivity, SensitivitySource
from kvtc_vllm.calibration.weights import Metric, RowWeights
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.transform import rows_from_keys
from kvtc_vllm.evaluation.data.public import Source
from kvtc_vllm.evaluation.tasks import open_task

TEXTS = ("essays", "maths", "library")
RETRIEVAL = "kv-retrieval"
KINDS_OF_TEXT = (*TEXTS, RETRIEVAL)
OF_EACH = 7
"""Documents of every kind."""
PREFIX, CONTINUATION = 640, 128
FIRST = 4
"""Positions left out."""
SHRINKAGE = 0.1


@dataclass(frozen=True)
class Gradients:
    """Of one document. kind: the task that it is of.

    every, ordinary: squared, summed over elements and tokens; float64 [2, L, H] for K and V.
    tokens, ordinary_tokens: over which was summed. outer: g g^T summed over all tokens, keys
    before RoPE; float32 [2, L, H, D, D].
    """

    kind: str
    every: torch.Tensor
    ordinary: torch.Tensor
    tokens: int
    ordinary_tokens: int
    outer: torch.Tensor


def collect(
    model: Path,
    data: Path,
    geometry: Geometry,
    ropes: Sequence[Rope | None],
    rule: SinkRule | None,
    kept: Path,
) -> list[Gradients]:
    """Gradients of `OF_EACH` documents of every kind, or those that `kept` has; see the module.

    data: directory of the public documents; the calibration part is read. geometry: of all heads,
    K and V of one head size. ropes: per layer.
    """
    if kept.exists():
        return [Gradients(**fields) for fields in torch.load(kept)]
    runner = Differentiable(model, "cpu")
    shape = CacheShape(
        geometry.num_layers, geometry.num_kv_heads, geometry.head_size, geometry.head_size_v
    )
    generator = torch.Generator().manual_seed(0)
    found = []
    jobs = list(calibration_documents(runner.tokenizer, data))
    for kind, ids, prefix in tqdm(jobs, unit="document"):
        (gradients,) = runner.gradients(ids, prefix, [shape], generator)
        found.append(reduce(kind, gradients, ropes, rule))
    with replacing(kept) as unfinished:
        torch.save([vars(gradients) for gradients in found], unfinished)
    return found


def calibration_documents(tokenizer: Any, data: Path) -> list[tuple[str, list[int], int]]:
    """Kind, token ids and tokens of the prefix, kinds in turn.

    What follows the prefix of a retrieval prompt is the end of the object, question and answer.
    """
    source = Source(str(data), "calibrate")
    rows = []
    for kind in KINDS_OF_TEXT:
        context = PREFIX + CONTINUATION - 32 if kind in TEXTS else PREFIX + CONTINUATION
        sessions = open_task(kind, source).sessions(tokenizer, context, OF_EACH, 0)
        examples = [session.turns[0] for session in sessions]
        ids = [example.prompt + example.target for example in examples]
        rows.append([(kind, each, len(each) - CONTINUATION) for each in ids])
    return [document for group in zip(*rows, strict=True) for document in group]


def reduce(
    kind: str, found: PrefixGradients, ropes: Sequence[Rope | None], rule: SinkRule | None
) -> Gradients:
    """Sums over tokens."""
    energies = torch.stack(found.energies())[..., FIRST:]
    values = found.cached_values[FIRST:]
    sinks = torch.zeros(len(values), dtype=torch.bool) if rule is None else rule.marks(values)
    positions = torch.arange(found.keys[0].shape[1])
    outer = []
    for of_kind in (found.keys, found.values):
        whole = torch.stack(list(of_kind), dim=0).permute(2, 0, 1, 3)
        # A rotation takes a gradient along.
        if of_kind is found.keys:
            whole = rows_from_keys(whole, ropes, positions).view(whole.shape)
        rows = whole[FIRST:].float()
        outer.append(torch.einsum("tlhd,tlhe->lhde", rows, rows))
    return Gradients(
        kind=kind,
        every=energies.sum(dim=-1),
        ordinary=energies[..., ~sinks].sum(dim=-1),
        tokens=energies.shape[-1],
        ordinary_tokens=int((~sinks).sum()),
        outer=torch.stack(outer),
    )


def marked_share(documents: Sequence[Gradients], kind: str) -> dict[str, float]:
    """Of the tokens of documents of a kind, and of their gradients' energy, in per cent."""
    own = [d for d in documents if d.kind == kind]
    tokens = 1 - sum(d.ordinary_tokens for d in own) / sum(d.tokens for d in own)
    # Of each document the same weight: some have many times the energy of others.
    energy = sum(1 - float(d.ordinary.sum() / d.every.sum()) for d in own) / len(own)
    return {"tokens": round(100 * tokens, 2), "energy": round(100 * energy, 1)}


def weights(
    documents: Sequence[Gradients],
    geometry: Geometry,
    *,
    ordinary: bool = False,
    metric: Metric = "layer",
) -> RowWeights:
    """Row weights from the average over these documents."""
    tokens = sum(d.ordinary_tokens if ordinary else d.tokens for d in documents)
    total = sum((d.ordinary if ordinary else d.every for d in documents), torch.zeros(()))
    k, v = total[0] / (tokens * geometry.head_size), total[1] / (tokens * geometry.head_size_v)
    return of_numbers(k.tolist(), v.tolist(), tokens, metric, geometry)


def of_numbers(
    keys: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    tokens: int,
    metric: Metric,
    geometry: Geometry,
) -> RowWeights:
    """Row weights from numbers per layer and head."""
    average = Average(keys=tuple(map(tuple, keys)), values=tuple(map(tuple, values)), tokens=tokens)
    source = SensitivitySource(
        model="",
        texts="",
        documents=0,
        prefix_tokens=PREFIX,
        continuation_tokens=CONTINUATION,
        sink_tokens=FIRST,
        max_len=0,
        heldout_fraction=0.0,
        seed=0,
    )
    found = Sensitivity(all_tokens=average, documents=(), source=source)
    return RowWeights(found, "all", metric, range(geometry.num_kv_heads))


def roots(documents: Sequence[Gradients]) -> torch.Tensor:
    """W^(1/2) per layer and head: float32 [2, L, H, D, D].

    W is the mean of g g^T, shrunk by a tenth towards its mean eigenvalue; the mean of all
    diagonals is 1.
    """
    outer = sum((d.outer.double() for d in documents), torch.zeros((), dtype=torch.float64))
    level = outer.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    unit = torch.eye(outer.shape[-1], dtype=torch.float64)
    shrunk = (1 - SHRINKAGE) * outer + SHRINKAGE * level[..., None, None] * unit
    eigenvalues, vectors = torch.linalg.eigh(shrunk / level.mean())
    # The floor of the layer weights, for the same reason.
    scaled = vectors * eigenvalues.clamp_min(4e-4).sqrt()[..., None, :]
    return (scaled @ vectors.transpose(-1, -2)).float()
