"""Tokenizers out of the metadata of a GGUF file, as `tokenizers` runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from benchmarks.models.errors import ModelError
from benchmarks.models.gguf_file import GgufFile

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of tokens in GGUF."""
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
_Pair = tuple[str, str]
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""


def byte_level_bpe(file: GgufFile) -> Tokenizer:
    """GPT-2's byte-level BPE behind a split of digits (llama.cpp's `smollm`).

    Every digit is a word of its own; then come GPT-2's words, then the merges.
    Raises `ModelError` for another way to split words.
    """
    model, pre = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise ModelError(
            f"{file.path.name}: tokenizer.ggml.model and .pre are {model!r} and {pre!r}; "
            "only 'gpt2' and 'smollm' can be converted"
        )
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(file), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file)
    return tokenizer


def scored_bpe(file: GgufFile) -> Tokenizer:
    """SentencePiece's BPE, whose merges follow from the scores of the tokens.

    What is in no token falls back to bytes. BOS is put in front where the file asks for it.
    Raises `ModelError` for another tokenizer.
    """
    model = file.field("tokenizer.ggml.model")
    if model != "llama":
        raise ModelError(
            f"{file.path.name}: tokenizer.ggml.model is {model!r}; only 'llama' can be converted"
        )
    tokens, types = _tokens(file)
    vocabulary = _vocabulary(file)
    scores = file.field("tokenizer.ggml.scores")
    normal = {t: i for t, i in vocabulary.items() if types[i] == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_from_scores(normal, {t: scores[i] for t, i in normal.items()}),
            unk_token=tokens[file.field("tokenizer.ggml.unknown_token_id")],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_tokens(tokenizer, file)
    if file.field("tokenizer.ggml.add_bos_token", False):
        bos = file.field("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def merges_from_scores(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[_Pair]:
    """All pairs of tokens that make a token, the pair of the token with the highest score first.

    vocabulary: ids of tokens that may be merged and made. SentencePiece joins the neighbours that
    make the best token, however it is divided, so all divisions of a token stand together. Their
    order is that of ids, as in the files for transformers.
    """
    merges: list[_Pair] = []
    for token in sorted(vocabulary, key=lambda token: -scores[token]):
        divisions = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(a, b) for a, b in divisions if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """Content of tokenizer_config.json, with the chat template if the file has one."""
    tokens, _ = _tokens(file)
    named = {name: file.field(f"tokenizer.ggml.{field}") for name, field in _SPECIAL.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[token_id] for name, token_id in named.items()},
        "model_max_length": file.parameter("context_length"),
        "clean_up_tokenization_spaces": False,
    }
    template = file.field("tokenizer.chat_template", None)
    return config if template is None else {**config, "chat_template": template}


def special_ids(file: GgufFile) -> dict[str, int]:
    """What config.json and generation_config.json say of special tokens."""
    return {
        f"{name}_id": file.field(f"tokenizer.ggml.{field}")
        for name, field in _SPECIAL.items()
        if name != "unk_token"
    }


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    return file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")


def _vocabulary(file: GgufFile) -> dict[str, int]:
    tokens, _ = _tokens(file)
    return {token: token_id for token_id, token in enumerate(tokens)}


def _add_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    """Tokens that are found in the text before it is split: control tokens, and plain text."""
    tokens, types = _tokens(file)
    found = list(zip(tokens, types, strict=True))
    control = [AddedToken(t, special=True, normalized=False) for t, k in found if k == CONTROL]
    tokenizer.add_special_tokens(control)
    plain = [AddedToken(t, special=False, normalized=False) for t, k in found if k == USER_DEFINED]
    tokenizer.add_tokens(plain)
