"""float32 <-> its bits, compiled: integers vectorise where NaN forbids it to floats.

The only compiled functions that others may import from another file. numba compiles what a
function calls into it, but looks only at the function's own file to see whether its cache is old.
"""

from __future__ import annotations

import numpy as np

from kvtc_vllm.codec.cpu.jit import jit


@jit
def bits_of(x: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(x).view(np.uint32)


@jit
def float_of(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(np.float32)
