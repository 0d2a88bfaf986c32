"""In which element type this machine's CPU runs a model: bfloat16, or float32 where that is faster.

A CPU without AVX-512 or AMX has no instructions for bfloat16. oneDNN, which vLLM multiplies with,
then takes six times as long as in float32.
"""

from __future__ import annotations

import time

import torch

_TOKENS, _IN, _OUT = 512, 576, 1536
"""A product of SmolLM2's MLP."""
_SECONDS = 0.2
SLOWER = 2.0
"""float32 caches are twice as large, so bfloat16 is kept unless it is this much slower."""
_FLOAT32_NOTE = (
    "This CPU multiplies bfloat16 much slower than float32, so the model runs in float32. "
    "Uncompressed KV is counted as 16 bits an element all the same."
)
BYTES = {"bfloat16": 2, "float32": 4}
"""Of an element."""


def served_dtype() -> str:
    """ "bfloat16" or "float32", by timing a product of each; takes half a second."""
    slower = _product_seconds(torch.bfloat16) > SLOWER * _product_seconds(torch.float32)
    return "float32" if slower else "bfloat16"


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds of the fastest of several products, after one that is not counted."""
    rows, weights = torch.ones(_TOKENS, _IN, dtype=dtype), torch.ones(_OUT, _IN, dtype=dtype)
    torch.nn.functional.linear(rows, weights)
    fastest, end = float("inf"), time.monotonic() + _SECONDS
    while time.monotonic() < end:
        started = time.perf_counter()
        torch.nn.functional.linear(rows, weights)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
