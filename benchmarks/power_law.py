"""An artifact and rows of any size whose spectrum is a power law, for timings without a model.

The basis is a random orthogonal one and the variances are given, so nothing is fitted; the plans
are those of the real dynamic program over drawn coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind, RankArtifact, SectionBasis
from kvtc_vllm.codec.bitplan import allocate
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import keys_from_rows, layer_ropes

FIT_ROWS = 1024
MAX_POSITIONS = 8192


@dataclass(frozen=True)
class PowerLaw:
    """Variance of coefficient i falls as i ** -exponent; columns past `rank` are not in bases."""

    geometry: Geometry
    ratios: tuple[float, ...]
    exponent: float = 1.2
    rank: int = 2048

    def artifact(self) -> RankArtifact:
        """All layers in one group, as the geometry says; a bfloat16 RoPE table, base 10000."""
        frequencies = 10000.0 ** (-torch.arange(0, self.geometry.head_size, 2).double() / 64)
        angles = torch.arange(MAX_POSITIONS).double()[:, None] * frequencies
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(torch.bfloat16)
        return RankArtifact(
            geometry=self.geometry,
            sections={(0, kind): self._section(kind) for kind in KINDS},
            ropes=(Rope(table),),
            layer_rope=(0,) * self.geometry.num_layers,
            fingerprint=bytes(16),
        )

    def chunk(self, artifact: RankArtifact, tokens: int, start: int) -> tuple[torch.Tensor, ...]:
        """K post-RoPE [T, L, H, D] and V [T, L, H, Dv] in bfloat16, of the artifact's spectrum."""
        heads = self.geometry.num_kv_heads
        shape = (tokens, self.geometry.num_layers, heads, -1)
        keys, values = (self._rows(artifact.sections[0, kind], kind, tokens) for kind in KINDS)
        positions = torch.arange(start, start + tokens)
        k = keys_from_rows(keys, layer_ropes(artifact, 0), positions, heads)
        return k.to(torch.bfloat16), values.view(shape).to(torch.bfloat16)

    def _section(self, kind: Kind) -> SectionBasis:
        p = self.geometry.row_size(0, kind)
        generator = torch.Generator().manual_seed(KINDS.index(kind))
        kept = min(self.rank, p)
        basis, _ = torch.linalg.qr(torch.randn(p, kept, generator=generator))
        mean = torch.randn(p, generator=generator)
        coefficients = self._coefficients(p, FIT_ROWS, generator)
        residual = float(coefficients[:, kept:].square().sum())
        plans = allocate(coefficients[:, :kept], p, self.ratios, residual_energy=residual)
        return SectionBasis(mean, basis.half(), plans)

    def _rows(self, section: SectionBasis, kind: Kind, tokens: int) -> torch.Tensor:
        p, kept = section.basis.shape
        generator = torch.Generator().manual_seed(100 + KINDS.index(kind))
        coefficients = self._coefficients(p, tokens, generator)
        # What lies past the basis is noise of its energy, in all directions.
        rest = float(coefficients[:, kept:].square().sum() / max(1, tokens * p)) ** 0.5
        noise = rest * torch.randn(tokens, p, generator=generator)
        return coefficients[:, :kept] @ section.basis.float().T + noise + section.mean

    def _coefficients(self, p: int, rows: int, generator: torch.Generator) -> torch.Tensor:
        deviation = torch.arange(1, p + 1) ** (-self.exponent / 2)
        deviation = deviation / deviation.square().mean().sqrt()
        uniform = torch.rand(rows, p, generator=generator).clamp(1e-6, 1 - 1e-6) - 0.5
        laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs()) / 2**0.5
        energy = (0.4 * torch.randn(rows, 1, generator=generator)).exp()
        return laplace * deviation * energy
