"""Launches of kernels that only compile: down to machine code, for GPUs that need not be there.

Import this before anything that imports the kernels: it makes them be decorated for a GPU. A
launch on CPU tensors then runs Triton's own binder and specialisation, the compiler and the ptxas
that comes with it, and not the kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

torch.cuda.is_available = lambda: True

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPERATION = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_DEFAULT_WARPS = 4
_WARP = 32


@dataclass(frozen=True)
class MachineCode:
    """One specialisation of a kernel. operations: how often each SASS operation is in it."""

    name: str
    about: str
    """Types and values of its arguments that it was compiled for."""
    constants: dict[str, Any]
    ptx: str
    registers: int
    stack: int
    local: int
    operations: dict[str, int]
    threads: int

    @property
    def instructions(self) -> int:
        return sum(self.operations.values())

    @property
    def spills(self) -> int:
        """Bytes of local memory and instructions that move registers to and from it."""
        moves = sum(n for op, n in self.operations.items() if op.startswith(("LDL", "STL")))
        return self.local + self.stack + moves

    def accesses(self, kind: str) -> dict[str, int]:
        """Global loads ("LDG") or stores ("STG") by operation."""
        return {op: n for op, n in self.operations.items() if op.startswith(kind)}


@dataclass
class Launches:
    """Every launch since it was made, in order, and the different specialisations among them."""

    names: list[str] = field(default_factory=list)
    kernels: dict[int, tuple[str, Any]] = field(default_factory=dict)

    def machine_code(self) -> Iterator[MachineCode]:
        """Of each specialisation."""
        for name, kernel in self.kernels.values():
            yield _machine_code(name, kernel)


class _Device:
    """What Triton asks of its driver before it launches."""

    capability = 90

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, _WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


_DEVICE = _Device()
driver.set_active(_DEVICE)
_run = JITFunction.run
_recorders: list[Launches] = []


def _compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    for recorder in _recorders:
        recorder.names.append(self.__name__)
        recorder.kernels.setdefault(id(kernel), (self.__name__, kernel))
    return kernel


JITFunction.run = _compile_only


def record(capability: int) -> Launches:
    """Compile for this compute capability from now on (90 for 9.0), and note launches."""
    _DEVICE.capability = capability
    _recorders[:] = [Launches()]
    return _recorders[0]


def _machine_code(name: str, kernel: Any) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _USAGE.search(_tool("cuobjdump", "-res-usage", str(cubin)))
        sass = _tool("nvdisasm", "-c", str(cubin))
    assert usage is not None, "cuobjdump has another form of output"
    operations: dict[str, int] = {}
    for line in sass.splitlines():
        found = _OPERATION.search(line)
        if found:
            operations[found.group(1)] = operations.get(found.group(1), 0) + 1
    source = kernel.src
    constants = {source.fn.arg_names[path[0]]: v for path, v in source.constants.items()}
    types = [t for t in source.signature.values() if t != "constexpr"]
    return MachineCode(
        name,
        f"{' '.join(types)} {constants}",
        constants,
        kernel.asm["ptx"],
        int(usage.group(1)),
        int(usage.group(2)),
        int(usage.group(4)),
        operations,
        _WARP * getattr(kernel.metadata, "num_warps", _DEFAULT_WARPS),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True
    ).stdout
