"""GGUF files: metadata, and tensors dequantised one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tqdm import tqdm

from benchmarks.models.errors import ModelError

_MISSING = object()


class GgufFile:
    """A GGUF file, mapped into memory. Raises ValueError or OSError if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = GGUFReader(path)
        self.architecture = str(self.field("general.architecture"))

    def field(self, name: str, default: object = _MISSING) -> Any:
        """A value of the metadata. Raises `ModelError` if it is absent and has no default."""
        found = self._reader.get_field(name)
        if found is not None:
            return found.contents()
        if default is _MISSING:
            raise ModelError(f"{self.path.name}: the metadata has no field {name!r}")
        return default

    def parameter(self, name: str) -> Any:
        """The same, of a field of the architecture, such as `block_count`."""
        return self.field(f"{self.architecture}.{name}")

    def floating(self, name: str) -> float:
        """The same, of a float32 that was meant in decimals: .00001 and not .00000999999975."""
        return float(f"{self.parameter(name):.6g}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and float32 values, in the file's order, rows first. Shows its progress on stderr.

        Raises `ModelError` for a quantisation that gguf cannot undo.
        """
        found = self._reader.tensors
        for tensor in tqdm(found, f"converting {self.path.stem}", unit="tensor", mininterval=1):
            try:
                values = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ModelError(
                    f"{self.path.name}: gguf cannot dequantise {tensor.name}, which is of type "
                    f"{tensor.tensor_type.name}"
                ) from error
            # A copy: the file is mapped read-only, which torch does not support.
            yield tensor.name, torch.from_numpy(np.array(values, dtype=np.float32))
