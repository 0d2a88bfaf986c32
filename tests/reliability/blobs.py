"""Blobs whose content follows from namespace and key, so that any reader can check them.

Imports no torch: writer processes start in tens of milliseconds.
"""

from __future__ import annotations

import random

import xxhash

NAMESPACE = bytes(range(16))
OTHER_NAMESPACE = bytes(range(16, 32))


def key_of(number: int) -> bytes:
    """A key as vLLM's block hashes are: 32 bytes, evenly spread."""
    return xxhash.xxh3_128_digest(b"key %d" % number) * 2


def blob_of(key: bytes, namespace: bytes = NAMESPACE, longest: int = 20_000) -> bytes:
    """The only blob that may ever be read under this key; its length depends on the key too."""
    generator = random.Random(namespace + key)
    head = b"KVTC" + generator.randbytes(56) + xxhash.xxh3_128_digest(namespace + key)
    content = head + generator.randbytes(generator.randrange(1, longest))
    return content + xxhash.xxh3_128_digest(content)


def twin_of(
    key: bytes, namespace: bytes = NAMESPACE, longest: int = 20_000, bodies: int = 3
) -> bytes:
    """As `blob_of`, but many keys have the same body: there are only so many."""
    body = random.Random(bytes((key[1] % bodies,)))
    head = b"KVTC" + random.Random(key).randbytes(56) + xxhash.xxh3_128_digest(namespace + key)
    content = head + body.randbytes(body.randrange(longest // 2, longest))
    return content + xxhash.xxh3_128_digest(content)
