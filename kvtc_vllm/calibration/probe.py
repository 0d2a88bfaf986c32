"""Rows kept beside an artifact, on which a server tests itself at start-up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PROBE_TOKENS = 128


@dataclass(frozen=True)
class Probe:
    """Up to 128 held-out tokens of one document, in order.

    k: float16 [n, L, H, D] pre-RoPE. v: float16 [n, L, H, Dv]. positions:
    int32 [n], ascending, not necessarily consecutive: where the tokens stood.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
