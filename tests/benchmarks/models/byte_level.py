"""A small byte-level BPE of our own, to compare tokenizers with.

Words are split by the expressions that llama.cpp documents for `smollm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import regex


def _alphabet() -> dict[int, str]:
    """The character that stands for each byte: itself if it can be printed, else one above 255."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + n) for n, b in enumerate(others)}


BYTES = _alphabet()
_NUMBER = regex.compile(r"(\p{N})")
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def words(text: str) -> list[str]:
    """Numerals are cut out one by one, the rest is split as GPT-2 does."""
    pieces = [piece for piece in _NUMBER.split(text) if piece]
    return [word for piece in pieces for word in _WORD.findall(piece)]


def encode(
    text: str,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    special: Sequence[str],
) -> list[int]:
    """Token ids: special tokens first, then words, then the merge of the lowest rank until none."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    cut = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
    ids: list[int] = []
    for piece in cut.split(text):
        if piece in special:
            ids.append(vocabulary[piece])
            continue
        for word in words(piece):
            symbols = [BYTES[byte] for byte in word.encode()]
            ids += [vocabulary[symbol] for symbol in _merge(symbols, ranks)]
    return ids


def _merge(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[at] not in ranks:
            break
        symbols = [*symbols[:at], "".join(pairs[at]), *symbols[at + 2 :]]
    return symbols
