"""The facts that tell one set-up's KV from another's, and their digest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import xxhash

SECRET = (
    "load_config.model_loader_extra_config",
    "additional_config",
    "connector.hash_seed",
    "connector.environment",
)
"""Facts that may hold credentials or help who makes hashes collide; people see a hash of them."""

SHORT = 40
"""Longest text that `short_facts` shows as it is."""


@dataclass(frozen=True)
class SetupIdentity:
    """facts: dotted name -> canonical text. undigested: names of values that have none.

    nonce: enters the digest if anything is undigested, so that nothing is shared then, not even
    with another engine of this process.
    """

    facts: Mapping[str, str]
    undigested: tuple[str, ...] = ()
    nonce: bytes = field(default_factory=lambda: os.urandom(16), compare=False, repr=False)

    def digest(self, weights: bytes = b"", generation: bytes = b"") -> bytes:
        """16 bytes over all facts, the live weights and their generation."""
        digest = xxhash.xxh3_128()
        names = sorted(self.facts)
        texts = (text for name in names for text in (name, self.facts[name]))
        nonce = self.nonce if self.undigested else b""
        for part in (*(text.encode() for text in texts), nonce, weights, generation):
            # With its length first, no part can pass for the end of another.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest()

    def short_facts(self) -> dict[str, str]:
        """Facts for people: the text, or 8 hex digits of its hash if it is long or secret."""
        return {
            name: text
            if len(text) <= SHORT and not name.startswith(SECRET)
            else xxhash.xxh3_64_hexdigest(text.encode())[:8]
            for name, text in self.facts.items()
        }
