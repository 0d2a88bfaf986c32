"""Keys of a request's chunks, and what a request says about its own caching."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from functools import cache
from typing import cast

import xxhash

from kvtc_vllm.offload.vllm_types import Request
from kvtc_vllm.tiers.keys import ChunkKey

logger = logging.getLogger("vllm.kvtc")

LOAD, STORE = "kvtc_load", "kvtc_store"
"""Keys of `kv_transfer_params`; false turns the tier off for one request."""


def chunk_keys(
    request: Request, hashes_per_chunk: int, adapter: bytes, first: int = 0, end: int | None = None
) -> list[ChunkKey]:
    """Keys of a request's chunks number first .. end - 1, or of all complete ones after the first.

    adapter: digest of its contents. vLLM's hash covers only the *name* of an adapter; chunks may
    outlive what a name stood for.
    """
    # The hash of a chunk's last block covers the whole prefix and any cache salt.
    last = None if end is None else end * hashes_per_chunk
    hashes = request.block_hashes[(first + 1) * hashes_per_chunk - 1 : last : hashes_per_chunk]
    if adapter:
        hashes = [of_block + adapter for of_block in hashes]
    return cast("list[ChunkKey]", hashes)


def tenant_of(request: Request) -> bytes:
    """Whose chunks a request's are: 16 bytes for each cache salt, and for none."""
    salt = getattr(request, "cache_salt", None)
    return xxhash.xxh3_128_digest(b"" if salt is None else b"salt" + str(salt).encode())


def token_bytes(request: Request, start: int, end: int) -> bytes:
    """Ids of a request's tokens start .. end - 1, int32."""
    return array("i", request.all_token_ids[start:end]).tobytes()


def allowed(request: Request, what: str) -> bool:
    """Whether the request lets its prefix be loaded (`LOAD`) or stored (`STORE`)."""
    params = getattr(request, "kv_transfer_params", None)
    if not isinstance(params, Mapping):
        return True
    value = params.get(what, True)
    if isinstance(value, bool):
        return value
    # The value itself comes from a client: it may be huge, or not hashable.
    _warn_ignored(what, type(value).__name__)
    return True


@cache
def _warn_ignored(what: str, type_name: str) -> None:
    """Say it once per process and type."""
    logger.warning(
        "kvtc: kv_transfer_params[%r] is a %s, not true or false; ignored", what, type_name
    )
