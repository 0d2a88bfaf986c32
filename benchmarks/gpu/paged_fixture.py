"""A paged cache with realistic contents, and the requests that read and write it."""

from __future__ import annotations

import torch

from benchmarks.gpu.models import SHAPES, Shape, deviations, synthetic_artifact
from kvtc_vllm.codec.base import Blob
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.codec.kernels.numeric import Precision, product
from kvtc_vllm.codec.kernels.paged import PagedCache, block_slots
from kvtc_vllm.codec.kernels.paged_codec import PAGED_CODECS, PagedCodec
from kvtc_vllm.codec.kernels.paged_io import scatter_rows
from kvtc_vllm.codec.kernels.resident import ordered
from tests.codec.kernels.requests import Load, Store

BLOCK_SIZE = 16
_FILL_TOKENS = 1024


class PagedFixture:
    """Codec and cache of one shape, filled with `tokens` tokens in shuffled blocks."""

    def __init__(
        self,
        shape_name: str,
        layers_per_group: int,
        ratio: float,
        tokens: int,
        device: torch.device,
        precision: Precision = "float16",
        workspace_bytes: int = 4 << 30,
        dtype: torch.dtype = torch.bfloat16,
        codec: str = "kvtc",
        paired: bool = False,
    ) -> None:
        self.shape: Shape = SHAPES[shape_name]
        self.tokens = tokens
        self.block_size = 4 if shape_name == "tiny" else BLOCK_SIZE
        blocks = tokens // self.block_size
        shape = self.shape
        width = 2 * shape.head_size
        layers = [
            # NHD: what vLLM's GPU backends register by default.
            torch.zeros(
                blocks, self.block_size, shape.kv_heads, width, dtype=dtype, device=device
            ).transpose(1, 2)
            for _ in range(shape.layers)
        ]
        self.cache = PagedCache.packed(layers, shape.head_size)
        artifact = synthetic_artifact(shape, layers_per_group, (ratio,), device, codec, paired)
        self.codec: PagedCodec = PAGED_CODECS[codec](
            artifact,
            ratio,
            self.cache,
            self.block_size,
            precision=precision,
            workspace_bytes=workspace_bytes,
        )
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
        self.block_ids: list[int] = order.tolist()
        self._fill()

    @property
    def raw_bytes(self) -> int:
        """Uncompressed KV of all tokens, in the cache's dtype."""
        return self.tokens * self.shape.token_bytes

    def stores(self, chunk_tokens: int) -> list[Store]:
        """All tokens, as chunks."""
        size = chunk_tokens // self.block_size
        return [
            Store(self.block_ids[first : first + size], first * self.block_size)
            for first in range(0, len(self.block_ids), size)
        ]

    def loads(self, chunk_tokens: int, blobs: list[Blob]) -> list[tuple[Load, Blob]]:
        """Back to where they came from."""
        return [
            (Load(store.start, store.block_ids), blob)
            for blob, store in zip(blobs, self.stores(chunk_tokens), strict=True)
        ]

    def encode(self, chunk_tokens: int) -> list[Blob]:
        """Encode everything. Raises what `encode_staged` returns as an error."""
        results = self.codec.encode_staged(self.codec.stage(self.stores(chunk_tokens)))
        blobs: list[Blob] = []
        for result in results:
            if isinstance(result, CodecError):
                raise result
            blobs.append(result)
        return blobs

    def _fill(self) -> None:
        resident = self.codec.resident
        slots = block_slots(self.block_ids, self.block_size).to(self.codec.device)
        drawn = torch.Generator(self.codec.device).manual_seed(2)
        for first in range(0, self.tokens, _FILL_TOKENS):
            part = slots[first : first + _FILL_TOKENS]
            positions = torch.arange(first, first + len(part), device=part.device)
            rows = torch.empty(len(part), resident.row, device=part.device)
            for key in resident.keys:
                basis, order = resident.synthesis[key], resident.orders[key]
                p, rank = basis.shape[0], int(order.sources.max()) + 1
                uniform = torch.rand((len(part), rank), generator=drawn, device=part.device).clamp(
                    1e-6, 1 - 1e-6
                )
                laplace = -(uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs())
                x = laplace / 2**0.5 * deviations(p, rank, part.device)
                own = ordered(order.unit * x, order.sources)
                product(own.to(basis.dtype), basis.T, rows[:, resident.columns[key]])
            scatter_rows(self.codec.rows, part, positions, resident.mean, rows)
