"""Compiles every kernel that serving launches, for GPUs that need not be there, and inspects it.

    python -m benchmarks.gpu.offline.check_kernels [80 90 100] [kvtc kvtc2] [--quick]

Launches are those of the serving code itself on the shapes of `served.SERVED`. Fails if a kernel
spills registers, uses a fused multiply-add or flushes subnormals where results must equal the
CPU's, reads or writes the cache in pieces of less than a word, needs more instructions per code
than `MOST_PER_CODE`, or if serving compiles something that start-up has not. kvtc kvtc2: of these
codecs only. --quick: the first case only.
"""

from __future__ import annotations

import re
import sys
import time

from benchmarks.gpu.offline import compiled  # isort: skip

from benchmarks.gpu.offline.served import (  # isort: skip
    SERVED,
    Case,
    ServedCodec,
    copy_units,
    waves_of,
    without_products,
)
from benchmarks.gpu.offline.step_tile_costs import step_instructions_per_code  # isort: skip
from benchmarks.gpu.offline.tile_costs import instructions_per_code  # isort: skip

INEXACT = re.compile(r"fma\.rn|\.ftz|div\.full|div\.approx|rcp\.approx")
CACHE_KERNELS = ("_gather_kernel", "_scatter_kernel", "_move_kernel")
NARROW = re.compile(r"^(LDG|STG)\.E\.[US](8|16)")
MOST_PER_CODE = {
    ("unpack", 2): 23.0,
    ("unpack", 4): 20.0,
    ("unpack", 8): 39.0,
    ("pack", 2): 47.0,
    ("pack", 4): 47.0,
    ("pack", 8): 57.0,
}
"""By direction and bits: static instructions per code of a wide tile. A sixth above what it was
when this was written."""
MOST_PER_STEP_CODE = {
    (way, bits): most
    for way, most in (("unpack", 240.0), ("pack", 128.0), ("escapes", 200.0))
    for bits in (2, 4, 8)
}
"""Of codec 2. A part of it runs only for wide escapes. Packing takes 102 to 110 since its tiles are
of 8 tokens, which an H200 packs in half the time that tiles of 32 took, with fewer instructions."""


def main(arguments: list[str]) -> int:
    """Number of problems found."""
    quick = "--quick" in arguments
    capabilities = [int(a) for a in arguments if a.isdigit()] or [80, 90, 100]
    codecs = {a for a in arguments if a in TILES} or set(TILES)
    cases = [case for case in SERVED if case.codec in codecs][: 1 if quick else None]
    checks = [TILES[name] for name in TILES if name in codecs]
    without_products()
    problems: list[str] = []
    for capability in capabilities:
        started = time.perf_counter()
        count = 0
        for case in cases:
            launches = compiled.record(capability)
            problems += [f"sm_{capability} {p}" for p in serve(case, launches)]
            count += len(launches.kernels)
            problems += [
                f"sm_{capability} {case.name}: {p}"
                for code in launches.machine_code()
                for p in inspect(code)
            ]
        problems += [f"sm_{capability} {p}" for check in checks for p in check(capability)]
        seconds = time.perf_counter() - started
        print(f"sm_{capability}: {count} specialisations in {seconds:.0f} s", flush=True)
    for problem in problems:
        print(f"FAILED  {problem}")
    return len(problems)


def serve(case: Case, launches: compiled.Launches) -> list[str]:
    """Start up and serve; what serving had to compile in addition is a problem."""
    codec = ServedCodec(case, 4 * 128)
    # As `warm_up.try_kernels` has it: a chunk with sinks and one without.
    blobs = codec.store([0, 1])
    codec.load([0, 1], blobs)
    codec.through_raw([0, 1])
    copy_units(8)
    ready = set(launches.kernels)
    for chunks in ([0], [1], [1, 2, 3], [0, 1, 2]):
        codec.load(chunks, codec.store(chunks))
        codec.through_raw(chunks)
    blobs = codec.store([1, 2, 3])
    codec.load([1, 2, 3], blobs, first_block=3)
    # What kernels get of a later wave, or of odd numbers of units, begins anywhere.
    with waves_of(1):
        codec.load([1, 2, 3], blobs)
    copy_units(7)
    late = [launches.kernels[key][0] for key in set(launches.kernels) - ready]
    return [f"{case.name}: {name} is compiled by a request" for name in late]


def inspect(code: compiled.MachineCode) -> list[str]:
    """What is wrong with a kernel."""
    problems: list[str] = []
    if code.spills:
        problems.append(f"{code.name} spills {code.spills}")
    inexact = sorted(set(INEXACT.findall(code.ptx)))
    if inexact:
        problems.append(f"{code.name} has {inexact}")
    if code.name in CACHE_KERNELS:
        narrow = [op for op in code.operations if NARROW.match(op)]
        if narrow:
            problems.append(f"{code.name} moves the cache by {narrow}: {code.about}")
    return problems


def check_tiles(capability: int) -> list[str]:
    """Wide tiles that cost more than stated."""
    found = instructions_per_code(capability)
    return [
        f"{way} of {bits} bits takes {cost:.1f} instructions per code"
        for (way, bits), cost in found.items()
        if cost > MOST_PER_CODE[way, bits]
    ]


def check_step_tiles(capability: int) -> list[str]:
    """Tiles of codec 2 that cost more than stated."""
    return [
        f"codec 2: {way} of {bits} bits takes {cost:.1f} instructions per code"
        for (way, bits), cost in step_instructions_per_code(capability).items()
        if cost > MOST_PER_STEP_CODE[way, bits]
    ]


TILES = {"kvtc": check_tiles, "kvtc2": check_step_tiles}
"""By codec, what checks its tiles."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
