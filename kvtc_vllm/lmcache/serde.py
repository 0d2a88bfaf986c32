"""The serde "kvtc" for LMCache's L2 adapters; importing this module registers it.

Output varies in size, so that it loads back through `kvtc_vllm.lmcache.adapter` only. LMCache
passes a whole batch or fails it: a chunk that is refused becomes an output of 0 bytes, which that
adapter leaves out, and the rest of the batch is stored.
"""

from __future__ import annotations

import math

import torch
from lmcache.logging import init_logger
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    get_registered_serde_types,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj

from kvtc_vllm.codec.raw import max_raw_blob_bytes
from kvtc_vllm.lmcache.counters import logger
from kvtc_vllm.lmcache.layout import check_chunk
from kvtc_vllm.lmcache.settings import load_settings
from kvtc_vllm.lmcache.transcoder import Refused, Transcoder, refusals, transcoder

SERDE_TYPE = "kvtc"


class KvtcSerializer(Serializer):
    """Chunk -> container. Called on the processor's threads, several at once."""

    def __init__(self, owner: Transcoder) -> None:
        self._transcoder = owner

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Write the container into `dst`; returns its length, 0 if the chunk is refused."""
        try:
            blob = self._transcoder.encode(_only_tensor(src), key)
            view = memoryview(dst.byte_array).cast("B")
            if len(blob) > len(view):
                raise Refused("space", f"{len(blob)} bytes do not fit a buffer of {len(view)}")
        except Refused as error:
            self._transcoder.counters.warn(f"refused_chunks/{error.reason}", str(error))
            return 0
        view[: len(blob)] = blob
        return len(blob)

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """The raw chunk and its container: some chunks are stored uncompressed."""
        pairs = zip(layout_desc.shapes, layout_desc.dtypes, strict=True)
        return max_raw_blob_bytes(sum(math.prod(shape) * dtype.itemsize for shape, dtype in pairs))


class KvtcDeserializer(Deserializer):
    """Container -> chunk. Called on the processor's threads, several at once."""

    def __init__(self, owner: Transcoder) -> None:
        self._transcoder = owner

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Overwrite `dst`. Raises Refused, upon which LMCache recomputes the whole batch.

        The adapter has verified the blob before, so this is for chunks of another shape.
        """
        try:
            blob = memoryview(src.byte_array).cast("B")
            self._transcoder.decode(blob, _only_tensor(dst), key)
        except Refused as error:
            self._transcoder.counters.warn(f"failed_loads/{error.reason}", str(error))
            raise


def create_kvtc_serde(values: dict[str, object]) -> SerdeProcessor:
    """LMCache's factory: the serde's JSON but its type. Raises ConfigError, ArtifactError."""
    settings = load_settings(values)
    owner = transcoder(settings)
    return AsyncSerdeProcessor(
        KvtcSerializer(owner), KvtcDeserializer(owner), max_workers=settings.max_workers
    )


def _only_tensor(chunk: MemoryObj) -> torch.Tensor:
    with refusals():
        check_chunk(chunk.get_shapes(), chunk.get_dtypes())
    return chunk.tensor


init_logger(logger.name)
if SERDE_TYPE not in get_registered_serde_types():
    register_serde_factory(SERDE_TYPE, create_kvtc_serde)
