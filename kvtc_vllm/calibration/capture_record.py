"""What a spool was captured from: SPOOL/capture.json.

It is written last, so that a spool without it is unfinished. A later run uses the spool if
everything that decides its rows is the same; a fit takes the model and the data from it.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from kvtc_vllm.artifact.replacing import replacing
from kvtc_vllm.calibration.documents import Text
from kvtc_vllm.codec.errors import ArtifactError

RECORD_NAME = "capture.json"
RECORD_VERSION = 1
_LOCK_NAME = "capture.lock"
_TOKENIZER_PATTERNS = (
    "*token*.json",
    "*.tiktoken",
    "*.model",
    "merges.txt",
    "vocab*",
    "chat_template*",
)


class CaptureSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides which rows a capture holds, the tensor-parallel size left out.

    model: fingerprints of configuration and weights, see `kvtc_vllm.artifact.identity`.
    tokenizer: hex of xxh3-128 of the tokeniser's files.
    tokens: rows asked for.
    max_len: longest document in tokens.
    sink_tokens: first positions of every document, which are left out.
    heldout_fraction: of the documents.
    seed: of cutting and sampling.
    engine: further arguments of `vllm.LLM`.
    texts: hex of xxh3-128 of all text that was read. How much depends on `tokens`, so this is
    compared last.
    """

    model: str
    tokenizer: str
    tokens: int
    max_len: int
    sink_tokens: int
    heldout_fraction: float
    seed: int
    engine: dict[str, Any]
    texts: str


class CaptureRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One finished capture.

    model_name: what to call the model on a card.
    files: names of the data, without directories.
    tp_size: ranks that the spool holds.
    source: what it was captured from.
    tokens_run: tokens that went through the model.
    """

    model_name: str
    files: tuple[str, ...]
    tp_size: int
    source: CaptureSource
    tokens_run: int
    version: int = RECORD_VERSION


def save_record(spool: Path, record: CaptureRecord) -> None:
    """Write capture.json, whole or not at all."""
    with replacing(spool / RECORD_NAME) as unfinished:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def find_record(spool: Path) -> CaptureRecord | None:
    """The record of a finished capture; None if there is none.

    Raises ArtifactError for a record that cannot be read.
    """
    path = spool / RECORD_NAME
    try:
        record = msgspec.json.decode(path.read_bytes(), type=CaptureRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if record.version != RECORD_VERSION:
        raise ArtifactError(
            f"{path}: version is {record.version}, this program reads {RECORD_VERSION}; "
            "capture again into another directory"
        )
    return record


def check_same(spool: Path, found: CaptureSource, wanted: CaptureSource) -> None:
    """Raise ArtifactError, naming the first difference, unless both have the same rows."""
    for field in CaptureSource.__struct_fields__:
        there, asked = getattr(found, field), getattr(wanted, field)
        if there != asked:
            raise ArtifactError(
                f"--spool {spool}: was captured with {field} {there}, not {asked}; give another "
                f"directory, or fit what it holds with: kvtc fit {spool}"
            )


def clear(spool: Path) -> bool:
    """Delete the ranks of a capture that did not finish; True if there were any."""
    places = (*spool.glob("rank[0-9]*"), *spool.glob("group[0-9]*"))
    ranks = [path for path in places if path.is_dir()]
    for path in ranks:
        shutil.rmtree(path)
    return bool(ranks)


@contextmanager
def capturing(spool: Path) -> Iterator[None]:
    """Keep other processes from capturing into the same spool. Raises ArtifactError if one does."""
    spool.mkdir(parents=True, exist_ok=True)
    with (spool / _LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(
                f"--spool {spool}: another process captures into it; wait for it, or give another "
                "directory"
            ) from error
        yield


def texts_fingerprint(texts: Sequence[Text]) -> str:
    """Hex of xxh3-128 of all texts in order."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(msgspec.json.encode(text))
    return digest.hexdigest()


def tokenizer_fingerprint(model_directory: Path) -> str:
    """Hex of xxh3-128 of the names and contents of a tokeniser's files."""
    digest = xxhash.xxh3_128()
    found = {p for pattern in _TOKENIZER_PATTERNS for p in model_directory.glob(pattern)}
    for path in sorted(found):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
