"""Captured KV rows on disk, between the model run and the fit.

One directory a rank:

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

from kvtc_vllm.artifact.rank_file import PROBE_TOKENS, Probe
from kvtc_vllm.codec.artifact import KINDS, Geometry, Kind
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.quantizers.base import to_fp16
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.codec.transform import rows_from_keys

SPOOL_VERSION = 1
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
_BLOCK_BYTES = 64 * 2**20


class SpoolHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a spool but its rows.

    dtype: cache dtype, "bfloat16", "float16" or "float32". layer_names: as the
    engine names them, one a layer. layer_rope: index into the RoPE tables a
    layer, None = not rotated. rope_neox: pairing order of each table.
    rows: tokens in the spool; `SpoolWriter.close` fills it in.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    layer_groups: tuple[tuple[int, int], ...]
    dtype: str
    layer_names: tuple[str, ...]
    layer_rope: tuple[int | None, ...]
    rope_neox: tuple[bool, ...]
    rank: int = 0
    tp_size: int = 1
    rows: int = 0
    version: int = SPOOL_VERSION

    def geometry(self) -> Geometry:
        """Shape of the cache on this rank."""
        return Geometry(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            layer_groups=self.layer_groups,
        )

    def row_shape(self, kind: Kind) -> tuple[int, int, int]:
        """Shape of one token of K or V: (L, H, D)."""
        size = self.head_size if kind == "k" else self.head_size_v
        return (self.num_layers, self.num_kv_heads, size)

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
    for name in ("layer_names", "layer_rope"):
        if len(getattr(header, name)) != header.num_layers:
            raise ValueError(
                f"{name} has {len(getattr(header, name))} entries for {header.num_layers} layers"
            )
    if tuple(rope.neox for rope in ropes) != header.rope_neox:
        raise ValueError(
            f"rope_neox {header.rope_neox} does not match the {len(ropes)} RoPE tables given"
        )
    bad = [i for i in header.layer_rope if i is not None and not 0 <= i < len(ropes)]
    if bad:
        raise ValueError(f"layer_rope names table {bad[0]}, but there are {len(ropes)}")
    header.geometry()


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


class SpoolReader:
    """Rows of a finished spool, ready for the fit (a `kvtc_vllm.calibration.fit.RowSource`).

    Files are memory-mapped and read in blocks of 64 MiB, so memory is the
    returned rows and little more. Raises ArtifactError for a spool that is
    unfinished, truncated or contradicts itself.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "header.json"
        try:
            self.header = msgspec.json.decode(path.read_bytes(), type=SpoolHeader)
            tables: dict[str, torch.Tensor] = {}
            if self.header.rope_neox:
                tables = load_file(self.directory / "ropes.safetensors")
            self.ropes = tuple(
                Rope(tables[f"rope{i}"], neox) for i, neox in enumerate(self.header.rope_neox)
            )
            _check_header(self.header, self.ropes)
        except FileNotFoundError as error:
            raise ArtifactError(
                f"{error.filename}: missing; the capture into {self.directory} did not finish"
            ) from error
        except (OSError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise ArtifactError(f"{path}: {error}") from error
        self.geometry = self.header.geometry()
        self.layer_rope = self.header.layer_rope
        self._data: dict[str, np.ndarray] = {
            kind: self._open(kind, np.dtype("u1"), self.header.token_bytes(kind)) for kind in KINDS
        }
        side = {name: self._open(name, dtype, 1)[:, 0] for name, dtype in _SIDE_FILES.items()}
        self.positions = torch.from_numpy(side["positions"].astype(np.int64))
        self.docs = torch.from_numpy(side["docs"].astype(np.int64))
        self.heldout = torch.from_numpy(side["heldout"].astype(np.bool_))
        self._check_positions()

    def count(self, *, heldout: bool) -> int:
        """Number of training or held-out rows."""
        return int((self.heldout == heldout).sum())

    def rows(
        self,
        group: int,
        kind: Kind,
        *,
        heldout: bool,
        limit: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Rows of one layer group, keys un-rotated: float32 [n, p], in spool order.

        limit: at most this many, drawn without replacement with `generator`.
        """
        chosen = (self.heldout == heldout).nonzero().flatten()
        if limit is not None and limit < len(chosen):
            drawn = torch.randperm(len(chosen), generator=generator)[:limit]
            chosen = chosen[drawn.sort().values]
        first, end = self.geometry.layer_groups[group]
        result = torch.empty(len(chosen), self.geometry.row_size(group, kind))
        ropes = [None if i is None else self.ropes[i] for i in self.layer_rope[first:end]]
        step = max(1, _BLOCK_BYTES // (4 * result.shape[1]))
        for start in range(0, len(chosen), step):
            index = chosen[start : start + step]
            block = self._cache_rows(kind, index, first, end)
            if kind == "k":
                rows = rows_from_keys(block, ropes, self.positions[index])
            else:
                rows = block.float().flatten(1)
            result[start : start + step] = rows
        return result

    def probe(self, limit: int = PROBE_TOKENS) -> Probe:
        """The first held-out tokens of the document that has most of them.

        Raises ArtifactError if no row is held out.
        """
        if not bool(self.heldout.any()):
            raise ArtifactError(f"{self.directory}: no held-out rows to take a probe from")
        docs = self.docs[self.heldout]
        values, counts = docs.unique(return_counts=True)
        chosen = (self.heldout & (self.docs == values[counts.argmax()])).nonzero().flatten()
        chosen = chosen[self.positions[chosen].argsort()][:limit]
        positions = self.positions[chosen]
        layers = self.header.num_layers
        keys = self._cache_rows("k", chosen, 0, layers)
        ropes = [None if i is None else self.ropes[i] for i in self.layer_rope]
        k = rows_from_keys(keys, ropes, positions).reshape(keys.shape)
        v = self._cache_rows("v", chosen, 0, layers)
        return Probe(k=to_fp16(k), v=to_fp16(v.float()), positions=positions.int())

    def _cache_rows(self, kind: Kind, index: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Layers first .. end of the indexed tokens: cache dtype [n, l, H, D]."""
        _, heads, size = self.header.row_shape(kind)
        layer_bytes = self.header.token_bytes(kind) // self.header.num_layers
        window = self._data[kind][:, first * layer_bytes : end * layer_bytes]
        raw = torch.from_numpy(np.ascontiguousarray(window[index.numpy()]))
        return raw.view(DTYPES[self.header.dtype]).reshape(-1, end - first, heads, size)

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
