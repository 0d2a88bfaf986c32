"""One LMCache chunk <-> one KVTC container.

Nothing here knows LMCache's classes: a chunk is a tensor, a key is five plain values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kvtc_vllm.codec.base import Blob, ChunkCodec
from kvtc_vllm.codec.container import DTYPES, parse
from kvtc_vllm.codec.errors import ArtifactError, CodecError, ContainerError
from kvtc_vllm.lmcache.codecs import CodecBook, RankCodecs
from kvtc_vllm.lmcache.counters import Counters, logger
from kvtc_vllm.lmcache.layout import LayoutRefused, check_chunk, load_page_reader, view_chunk
from kvtc_vllm.lmcache.positions import BOOK, PositionBook
from kvtc_vllm.lmcache.settings import LMCacheSettings


class Key(Protocol):
    """What names a chunk: LMCache's ObjectKey."""

    @property
    def chunk_hash(self) -> bytes: ...
    @property
    def model_name(self) -> str: ...
    @property
    def kv_rank(self) -> int: ...
    @property
    def object_group_id(self) -> int: ...
    @property
    def cache_salt(self) -> str: ...


class Refused(Exception):
    """This chunk is not stored, or this blob not loaded. `reason` is a stable word for a metric."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def refusals(layout: str = "layout") -> Iterator[None]:
    """Raise what is wrong with a chunk, its blob or its artifact as Refused.

    layout: reason for a LayoutRefused.
    """
    try:
        yield
    except LayoutRefused as error:
        raise Refused(layout, str(error)) from error
    except ArtifactError as error:
        raise Refused("artifact", str(error)) from error
    except ContainerError as error:
        raise Refused(error.reason, str(error)) from error


class Transcoder:
    """Codes the chunks of one model. Thread-safe.

    Raises ArtifactError at construction if there is no such model, LayoutRefused if `page_order`
    is "cpu" and there is no vLLM.
    """

    def __init__(self, settings: LMCacheSettings, positions: PositionBook = BOOK) -> None:
        if settings.page_order == "cpu":
            load_page_reader()
        self.settings = settings
        self.counters = Counters()
        self._codecs = CodecBook(settings)
        self._positions = positions

    def namespace(self, key: Key) -> str:
        """Name of the artifact that codes this key: blobs of another one are never met.

        Raises Refused.
        """
        self._check_model(key)
        with refusals():
            return self._codecs.fingerprint(key.kv_rank)

    def encode(self, chunk: torch.Tensor, key: Key) -> bytes:
        """The container of a chunk. Raises Refused if it is not to be stored.

        chunk: CPU tensor of a shape that `kvtc_vllm.lmcache.layout` knows.
        """
        codecs = self._rank_codecs(key, chunk.shape, chunk.dtype)
        with refusals():
            view = view_chunk(chunk, codecs.kvtc.geometry, self.settings.block_size)
        k, v = view.read()
        blob = self._encode_lossy(codecs, k, v, key)
        if blob is None:
            if self.settings.fallback == "drop":
                raise Refused("uncodable", "a chunk that KVTC can't code is dropped")
            # A raw container is exact whatever its positions; they are not used, so not claimed.
            blob = codecs.raw.encode(k, v, 0, key=bound_name(key))
            self.counters.add("stored_raw_chunks")
        self.counters.add("stored_chunks")
        self.counters.add("stored_raw_bytes", chunk.nbytes)
        self.counters.add("stored_bytes", len(blob))
        return blob

    def decode(self, blob: Blob, chunk: torch.Tensor, key: Key) -> None:
        """Overwrite `chunk` with what the container holds; the start position is the container's.

        Raises Refused, before anything is written, if the blob is damaged or not this key's.
        """
        codecs = self._rank_codecs(key, chunk.shape, chunk.dtype)
        with refusals():
            view = view_chunk(chunk, codecs.kvtc.geometry, self.settings.block_size)
            codec = _codec_of(blob, codecs)
            decoded = codec.decode(blob, expect_tokens=chunk.shape[-2], key=bound_name(key))
        view.write(decoded.k, decoded.v)
        self.counters.add("loaded_chunks")
        self.counters.add("loaded_bytes", len(blob))

    def verify(self, blob: Blob, key: Key) -> None:
        """Check everything about a blob that needs no decoding. Raises Refused."""
        self._check_model(key)
        with refusals():
            dtype = DTYPES.get(parse(blob).header.dtype_code)
            if dtype is None:
                raise ContainerError("geometry", "written for an unknown cache dtype")
            codecs = self._codecs.of(key.kv_rank, dtype)
            _codec_of(blob, codecs).decode_groups(blob, key=bound_name(key))

    def _encode_lossy(
        self, codecs: RankCodecs, k: torch.Tensor, v: torch.Tensor, key: Key
    ) -> bytes | None:
        """The KVTC container of a chunk, None if it can't be or should not be coded."""
        start = self._positions.start_of(key.chunk_hash, self.settings.position_wait)
        source = "event"
        if start is None or not codecs.recognition.recognises(k, v, start):
            if start is not None:
                self.counters.add("position_contradicted")
            source, start = "recovered", codecs.recognition.find_start(k, v)
        if start is None:
            self.counters.warn(
                "position_unknown",
                f"a chunk of {key.model_name} does not look like the calibrated model at any "
                "position; if this is counted often, page_order or the artifact is wrong",
            )
            return None
        self.counters.add(f"position_{source}")
        try:
            return codecs.kvtc.encode(k, v, start, key=bound_name(key))
        except CodecError as error:
            self.counters.warn("uncodable", f"a chunk can't be coded: {error}")
            return None

    def _rank_codecs(self, key: Key, shape: Sequence[int], dtype: torch.dtype) -> RankCodecs:
        self._check_model(key)
        with refusals(layout="dtype"):
            return self._codecs.of(key.kv_rank, check_chunk([torch.Size(shape)], [dtype]))

    def _check_model(self, key: Key) -> None:
        if key.model_name not in self.settings.served_names:
            raise Refused(
                "model",
                f"a chunk of {key.model_name!r} reached KVTC, which is set up for "
                f"{self.settings.served_names}; add it to model_names if it is the same model",
            )


@functools.cache
def transcoder(settings: LMCacheSettings) -> Transcoder:
    """The process's transcoder for these settings, shared by serde and adapter."""
    made = Transcoder(settings)
    logger.info("kvtc: codes chunks of %s at %gx", settings.served_names, settings.ratio)
    return made


def bound_name(key: Key) -> bytes:
    """All of a key as bytes: a blob decodes under the name it was stored under, and no other."""
    fields = (key.model_name, key.kv_rank, key.object_group_id, key.cache_salt)
    return key.chunk_hash + repr(fields).encode()


def _codec_of(blob: Blob, codecs: RankCodecs) -> ChunkCodec:
    """The codec that wrote the blob. Raises ContainerError if it is damaged."""
    by_id: dict[int, ChunkCodec] = {c.codec_id: c for c in (codecs.kvtc, codecs.raw)}
    codec_id = parse(blob).header.codec_id
    if codec_id not in by_id:
        raise ContainerError("version", f"codec {codec_id} is not known")
    return by_id[codec_id]
