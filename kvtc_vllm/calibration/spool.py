"""Captured KV rows on disk, between the model run and the fit.

One directory per rank:

    k.bin          cache dtype [n, L, H, D], post-RoPE, exactly as in the cache
    v.bin          cache dtype [n, L, H, Dv]
    positions.bin  int32 [n]
    docs.bin       int32 [n], which document a token came from
    heldout.bin    uint8 [n], 1 = never shown to the fit
    ropes.safetensors   cos_sin tables "rope{i}", only if the model has any
    header.json    `SpoolHeader`; written last, so a spool without it is unfinished

All binary files are raw little-endian arrays. Which tokens are sampled is the
caller's decision.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.calibration.rows import CapturedRows
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind, check_layer_rope
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.offload.reach import Reach, named_reach

SPOOL_VERSION = 2
DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_SIDE_FILES: dict[str, np.dtype] = {
    "positions": np.dtype("<i4"),
    "docs": np.dtype("<i4"),
    "heldout": np.dtype("u1"),
}


def cache_group_places(spool: Path) -> list[Path]:
    """Where the ranks of each cache group lie in a spool."""
    places = [spool]
    while (place := group_directory(spool, len(places))).is_dir():
        places.append(place)
    return places


class SpoolHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a spool but its rows.

    geometry: of the rank that was captured, all layers in one group.
    total_kv_heads: per layer, of all ranks together.
    dtype: cache dtype, "bfloat16", "float16" or "float32".
    layer_names: as the engine names them, one per layer.
    layer_rope: per layer the number of its RoPE table; None = not rotated.
    rope_neox: pairing order of each table.
    rank, tp_size: which of how many tensor-parallel ranks was captured.
    rows: tokens in the spool; `SpoolWriter.close` fills it in.
    attention, layers: of the cache group, see `CacheGroupCard`; not told by older spools, which are
    of models with one group.
    """

    geometry: Geometry
    total_kv_heads: int
    dtype: str
    layer_names: tuple[str, ...]
    layer_rope: tuple[int | None, ...]
    rope_neox: tuple[bool, ...]
    rank: int = 0
    tp_size: int = 1
    rows: int = 0
    attention: str = "full"
    layers: tuple[int, ...] = ()
    version: int = SPOOL_VERSION

    def row_shape(self, kind: Kind) -> tuple[int, int, int]:
        """Shape of one token of K or V: (L, H, D)."""
        size = self.geometry.head_size if kind == "k" else self.geometry.head_size_v
        return (self.geometry.num_layers, self.geometry.num_kv_heads, size)

    def token_bytes(self, kind: Kind) -> int:
        """Bytes of one token of K or V in the spool."""
        layers, heads, size = self.row_shape(kind)
        return layers * heads * size * DTYPES[self.dtype].itemsize


def _check_header(header: SpoolHeader, ropes: tuple[Rope, ...]) -> None:
    """Raise ValueError unless the header agrees with itself and with the RoPE tables."""
    if header.version != SPOOL_VERSION:
        raise ValueError(f"version is {header.version}, this program reads {SPOOL_VERSION}")
    if header.dtype not in DTYPES:
        raise ValueError(f'dtype "{header.dtype}" is not one of {", ".join(DTYPES)}')
    if len(header.layer_names) != header.geometry.num_layers:
        raise ValueError(
            f"layer_names has {len(header.layer_names)} entries "
            f"for {header.geometry.num_layers} layers"
        )
    if tuple(rope.neox for rope in ropes) != header.rope_neox:
        raise ValueError(
            f"rope_neox {header.rope_neox} does not match the {len(ropes)} RoPE tables given"
        )
    check_layer_rope(header.layer_rope, ropes, header.geometry.num_layers)


class SpoolWriter:
    """Appends captured rows to a new spool directory.

    Not thread-safe. Use as a context manager or call `close`; without it the
    spool is refused as unfinished. Raises ValueError for a header that
    contradicts itself, FileExistsError for a directory that holds a spool.
    """

    def __init__(self, directory: Path, header: SpoolHeader, ropes: tuple[Rope, ...] = ()) -> None:
        _check_header(header, ropes)
        self._directory = Path(directory)
        self._header = header
        self._dtype = DTYPES[header.dtype]
        self.rows = 0
        self._directory.mkdir(parents=True, exist_ok=True)
        if (self._directory / "header.json").exists():
            raise FileExistsError(f"{self._directory} already holds a spool")
        if ropes:
            tables = {f"rope{i}": r.cos_sin.detach().cpu().clone() for i, r in enumerate(ropes)}
            save_file(tables, self._directory / "ropes.safetensors")
        self._files: dict[str, BinaryIO] = {
            name: (self._directory / f"{name}.bin").open("wb") for name in ("k", "v", *_SIDE_FILES)
        }

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        doc: int,
        heldout: bool | torch.Tensor,
    ) -> None:
        """Add n tokens of one document.

        k: [n, L, H, D] post-RoPE, v: [n, L, H, Dv], cache dtype, any device
        and strides. positions: int [n]. heldout: one flag for all, or bool
        [n]. Raises ValueError for a wrong shape or dtype; nothing is then
        written.
        """
        count = int(positions.numel())
        for kind, x in zip(KINDS, (k, v), strict=True):
            expected = (count, *self._header.row_shape(kind))
            if tuple(x.shape) != expected or x.dtype != self._dtype:
                raise ValueError(
                    f"{kind} is {x.dtype} {tuple(x.shape)}, expected {self._dtype} {expected}"
                )
        flags = torch.as_tensor(heldout, dtype=torch.bool).cpu().expand(count)
        self._files["k"].write(_raw(k))
        self._files["v"].write(_raw(v))
        self._files["positions"].write(positions.cpu().numpy().astype("<i4").tobytes())
        self._files["docs"].write(np.full(count, doc, dtype="<i4").tobytes())
        self._files["heldout"].write(flags.numpy().astype("u1").tobytes())
        self.rows += count

    def close(self) -> None:
        """Finish the spool. Calling it again does nothing."""
        if all(file.closed for file in self._files.values()):
            return
        self._close_files()
        finished = msgspec.structs.replace(self._header, rows=self.rows)
        encoded = msgspec.json.format(msgspec.json.encode(finished), indent=1)
        (self._directory / "header.json").write_bytes(encoded)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self.close()
        else:
            self._close_files()


class SpoolReader(CapturedRows):
    """Rows of a finished spool, for the rank that was captured.

    Files are memory-mapped. Raises ArtifactError for a spool that is
    unfinished, truncated or contradicts itself.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "header.json"
        try:
            data = path.read_bytes()
            # The version comes first, or another one would be reported as a missing field.
            version = msgspec.json.decode(data, type=_Versioned).version
            if version != SPOOL_VERSION:
                raise ArtifactError(
                    f"{path}: version is {version}, this program reads {SPOOL_VERSION}; "
                    "capture again into another directory"
                )
            self.header = msgspec.json.decode(data, type=SpoolHeader)
            tables: dict[str, torch.Tensor] = {}
            if self.header.rope_neox:
                tables = load_file(self.directory / "ropes.safetensors")
            ropes = tuple(
                Rope(tables[f"rope{i}"], neox) for i, neox in enumerate(self.header.rope_neox)
            )
            _check_header(self.header, ropes)
            self.reach: Reach = named_reach(self.header.attention)
            """Of the attention that was captured."""
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{error.filename}: missing; the capture into {self.directory} did not finish"
            ) from error
        except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise ArtifactError(f"{path}: {error}") from error
        self._data: dict[str, np.ndarray] = {
            kind: self._open(kind, np.dtype("u1"), self.header.token_bytes(kind)) for kind in KINDS
        }
        side = {name: self._open(name, dtype, 1)[:, 0] for name, dtype in _SIDE_FILES.items()}
        super().__init__(
            self.header.geometry,
            ropes,
            self.header.layer_rope,
            torch.from_numpy(side["positions"].astype(np.int64)),
            torch.from_numpy(side["docs"].astype(np.int64)),
            torch.from_numpy(side["heldout"].astype(np.bool_)),
        )
        self._check_positions()

    def cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Layers first .. end - 1 of the indexed tokens: cache dtype [n, l, H, D]."""
        return self.cache_heads(kind, index, first, end, 0, self.header.geometry.num_kv_heads)

    def cache_heads(
        self, kind: Kind, index: torch.Tensor, first: int, end: int, head: int, end_head: int
    ) -> torch.Tensor:
        """The same of heads head .. end_head - 1 alone: cache dtype [n, l, h, D]."""
        layers, heads, size = self.header.row_shape(kind)
        head_bytes = size * DTYPES[self.header.dtype].itemsize
        data = self._data[kind].reshape(self.header.rows, layers, heads * head_bytes)
        window = data[:, first:end, head * head_bytes : end_head * head_bytes]
        raw = torch.from_numpy(np.ascontiguousarray(window[index.numpy()]))
        shape = (len(index), end - first, end_head - head, size)
        return raw.view(DTYPES[self.header.dtype]).reshape(shape)

    def _open(self, name: str, dtype: np.dtype, width: int) -> np.ndarray:
        path = self.directory / f"{name}.bin"
        expected = self.header.rows * width * dtype.itemsize
        if not path.is_file() or path.stat().st_size != expected:
            size = path.stat().st_size if path.is_file() else "no"
            raise ArtifactError(
                f"{path}: holds {size} bytes, {expected} are right for {self.header.rows} rows"
            )
        if expected == 0:
            raise ArtifactError(f"{path}: the spool is empty; the capture sampled no tokens")
        return np.memmap(path, dtype=dtype, mode="r", shape=(self.header.rows, width))

    def _check_positions(self) -> None:
        lowest, highest = int(self.positions.min()), int(self.positions.max())
        limit = min((rope.max_positions for rope in self.ropes), default=2**31)
        if lowest < 0 or highest >= limit:
            raise ArtifactError(
                f"{self.directory}/positions.bin: positions {lowest}..{highest} are outside "
                f"the RoPE table of {limit} positions"
            )


def _raw(x: torch.Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Versioned(msgspec.Struct):
    version: int = 0
