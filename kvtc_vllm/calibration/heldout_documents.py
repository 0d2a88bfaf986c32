"""Held-out documents beside a spool's rows, for whatever replays the model on them.

They are cut from the text of the capture as the capture cut them, and kept as token ids in
SPOOL/heldout.json, so that a later fit needs no text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvtc_vllm.artifact.identity import model_directory
from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.capture import PREFILL_FACTOR, CaptureSettings
from kvtc_vllm.calibration.capture_record import CaptureRecord
from kvtc_vllm.calibration.documents import Document, read_texts
from kvtc_vllm.calibration.gradients import (
    GradientSettings,
    calibration_documents,
    sensitivity_source,
)
from kvtc_vllm.calibration.in_transformers import Asked, max_positions
from kvtc_vllm.codec.errors import ArtifactError

DOCUMENTS_NAME = "heldout.json"
DOCUMENTS = 8
PREFIX_TOKENS, EXACT_TOKENS, SCORED_TOKENS = 768, 128, 128
"""Of a document that is long enough; shorter ones are cut in proportion."""


class HeldoutDocuments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Token ids of held-out documents, by their number in the spool. model: see `CaptureSource`."""

    model: str
    documents: dict[int, tuple[int, ...]]


def spool_heldout(
    capture: CaptureSettings, record: CaptureRecord, spool: Path, asked: Asked
) -> None:
    """Leave SPOOL/heldout.json, cut from the text of the capture.

    The longest held-out documents; among those that are long enough the seed draws. asked: for
    messages. Raises DataError for unreadable text, ArtifactError if transformers has no tokeniser.
    """
    total = PREFILL_FACTOR * capture.tokens
    texts = read_texts(capture.data, total)
    directory = model_directory(capture.model, capture.engine.get("revision"))
    limit = capture.engine.get("max_model_len")
    try:
        from transformers import AutoConfig, AutoTokenizer

        options = {"trust_remote_code": bool(capture.engine.get("trust_remote_code"))}
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        if not isinstance(limit, int):
            limit = max_positions(AutoConfig.from_pretrained(directory, **options))
    except Exception as error:  # whatever a model's own code raises
        raise asked.unusable(directory, error) from error
    source = sensitivity_source(capture, record, texts, GradientSettings())
    keep_heldout(spool, record, calibration_documents(texts, tokenizer, source, total, limit))


def keep_heldout(
    spool: Path, record: CaptureRecord, documents: Sequence[Document], most: int = DOCUMENTS
) -> None:
    """Write the file of `spool_heldout` from all documents of a capture."""
    wanted = PREFIX_TOKENS + EXACT_TOKENS + SCORED_TOKENS
    usable = [document for document in documents if document.heldout]
    random.Random(record.source.seed).shuffle(usable)
    # Stable: among those that are long enough the draw decides.
    usable.sort(key=lambda document: -min(len(document.token_ids), wanted))
    kept = HeldoutDocuments(
        model=record.source.model,
        documents={d.doc: tuple(d.token_ids[:wanted]) for d in usable[:most]},
    )
    with replacing(spool / DOCUMENTS_NAME) as unfinished:
        unfinished.write_bytes(msgspec.json.encode(kept))


def load_heldout(spool: Path, model: str) -> HeldoutDocuments:
    """Read what `spool_heldout` left. model: of the spool.

    Raises ArtifactError, naming the file, if it is missing, malformed or of another model.
    """
    path = spool / DOCUMENTS_NAME
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=HeldoutDocuments)
    except OSError as error:
        raise ArtifactError(
            f"{path}: {error.strerror}; kvtc calibrate --quality-curve --spool DIR leaves it"
        ) from error
    except msgspec.MsgspecError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if kept.model != model:
        raise ArtifactError(f"{path}: is of model {kept.model}, the spool of {model}")
    return kept
