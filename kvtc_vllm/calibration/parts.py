"""Bases most of whose columns are of some layers alone, so that products cost less.

What all layers have in common is in the columns of largest variance. A basis *in parts* has the
principal directions of each part of the layers, and turns those of most variance, of all parts
together, once more: so they are the principal directions of what they span, over all layers. The
others stay what they are, 0 outside their part. Columns are orthonormal as ever, and whoever reads
an artifact needs to know nothing of it.

Source: two-step PCA, as in multi-block (hierarchical) PCA.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from kvtc_vllm.calibration.pca import PrincipalBasis, Progress, Rows, fix_signs, rows_mean
from kvtc_vllm.calibration.solvers import product_dtype
from kvtc_vllm.codec.artifact import Geometry, SectionName

TURNED = 1 / 12
"""Columns of all layers by default, over the elements of a row."""


def part_elements(
    geometry: Geometry, group: int, name: SectionName, parts: int
) -> list[torch.Tensor]:
    """Which elements of a section's rows each of `parts` runs of layers has: int64 [p_i] each.

    Fewer parts where a layer group has fewer layers.
    """
    first, end = geometry.layer_groups[group]
    layers = end - first
    count = min(parts, layers)
    edges = [layers * i // count for i in range(count + 1)]
    found = []
    for a, b in pairwise(edges):
        own = []
        for place in geometry.row_parts(group, name).values():
            size = (place.stop - place.start) // layers
            own.append(torch.arange(place.start + a * size, place.start + b * size))
        found.append(torch.cat(own))
    return found


def fit_in_parts(
    rows: Rows,
    parts: Sequence[torch.Tensor],
    turned: int,
    *,
    rank_cap: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> PrincipalBasis:
    """As `pca.fit_basis`, in parts.

    rows: n >= 2 of p elements, passed over three times. parts: which elements are of each,
    together all. turned: so many columns are of all parts, those of largest variance in theirs.
    Raises ValueError for a row that is not finite.
    """
    where = torch.device(device)
    report = progress or (lambda stage, done, total: None)
    mean = rows_mean(rows, where, report)
    centre = mean.float()
    places = [part.to(where) for part in parts]
    sizes = [len(part) for part in parts]
    dtype = product_dtype(max(sizes))
    covariances = [torch.zeros(size, size, dtype=dtype, device=where) for size in sizes]
    done = 0
    for block in rows.blocks():
        report("covariance", done, rows.count)
        centred = (block.to(where) - centre).to(dtype)
        for place, products in zip(places, covariances, strict=True):
            own = centred[:, place]
            products.addmm_(own.T, own)
        done += len(block)
    total = sum(float(products.diagonal().double().sum()) for products in covariances) / rows.count
    bases, variances = [], []
    for number, products in enumerate(covariances):
        report("eigh", number, len(parts) + 1)
        values, vectors = torch.linalg.eigh(products / rows.count)
        bases.append(vectors.flip(1).float())
        variances.append(values.flip(0))
    del covariances
    least = torch.cat(variances).sort(descending=True).values[:turned][-1:]
    counts = [int((values >= least).sum()) if turned else 0 for values in variances]
    leading = [basis[:, :count] for basis, count in zip(bases, counts, strict=True)]
    common = torch.zeros(sum(counts), sum(counts), dtype=dtype, device=where)
    done = 0
    for block in rows.blocks():
        report("covariance", done, rows.count)
        centred = block.to(where) - centre
        own = torch.cat([centred[:, i] @ v for i, v in zip(places, leading, strict=True)], dim=1)
        own = own.to(dtype)
        common.addmm_(own.T, own)
        done += len(block)
    report("eigh", len(parts), len(parts) + 1)
    values, turn = torch.linalg.eigh(common / rows.count)
    turn, variance = turn.flip(1).float(), [values.flip(0)]
    rank = min(rank_cap, rows.count - 1, rows.row_size)
    for own, count in zip(variances, counts, strict=True):
        variance.append(own[count:])
    falling, order = torch.cat(variance).sort(descending=True)
    # Where in the basis a column goes: those of all parts come first, then part by part.
    alone = [size - count for size, count in zip(sizes, counts, strict=True)]
    places_of = order.argsort().split([sum(counts), *alone])
    basis = torch.zeros(rows.row_size, rank, device=where)
    first = 0
    for place, own, lead, rest in zip(places, bases, leading, places_of[1:], strict=True):
        count = lead.shape[1]
        turned_here = lead @ turn[first : first + count]
        for columns, to in ((turned_here, places_of[0]), (own[:, count:], rest)):
            kept = to < rank
            basis[place[:, None], to[kept]] = columns[:, kept]
        first += count
    return PrincipalBasis(
        mean=centre.cpu(),
        basis=fix_signs(basis).cpu(),
        variance=falling[:rank].clamp_min(0.0).double().cpu(),
        total_variance=total,
        method="eigh",
    )
