"""Show what an artifact directory, a stored blob or a disk tier is.

kvtc inspect calibrations/my-model/artifact
kvtc inspect chunk.kvtc
kvtc inspect /var/cache/kvtc
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from kvtc_vllm.artifact.regular_file import read_regular
from kvtc_vllm.cli.facts import print_facts
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.tiers.disk import DiskError
from kvtc_vllm.tiers.disk.layout import LAYOUT_FILE
from kvtc_vllm.tiers.disk.survey import MAX_BLOB_BYTES, NamespaceSummary, Survey

RATIO_SAMPLE = 16
"""Chunks per namespace whose headers are read for its ratio."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", help="artifact directory, blob file or root of a disk tier")
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def run(args: argparse.Namespace) -> int:
    """Verify and describe; a broken blob or artifact is an error."""
    path = Path(args.path)
    if os.path.lexists(path / LAYOUT_FILE):
        described = describe_tier(path)
    elif path.is_dir():
        described = describe_artifact(path)
    else:
        described = describe_blob(path)
    print_facts(described, args.json)
    return 0


def describe_artifact(directory: Path) -> dict[str, Any]:
    """The card, with every rank file loaded and checked against it. Raises ArtifactError."""
    from kvtc_vllm.artifact.card import cache_groups, load_card
    from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact

    card = load_card(directory)
    groups = cache_groups(card)
    described: dict[str, Any] = msgspec.to_builtins(card)
    described["sections"] = []
    for number in range(max(1, len(groups))):
        place = group_directory(directory, number)
        part = load_card(place)
        for rank in range(part.tp_size):
            load_rank_artifact(place, rank)
        of_group = f"{groups[number].attention}, " if groups else ""
        described["sections"] += [
            {
                "section": f"{of_group}rank {s.rank} group {s.group} {s.kind.upper()}",
                "row": s.row_size,
                "basis": s.basis_rank,
                "heldout error": {f"{e.ratio:g}x": round(e.heldout, 5) for e in s.errors},
            }
            for s in part.sections
        ]
    return described


def describe_blob(path: Path) -> dict[str, Any]:
    """Header and sections of a container.

    Raises ContainerError if it is damaged, ArtifactError for what is no file of a blob's size.
    """
    return _describe(path, read_regular(path, MAX_BLOB_BYTES))


def _describe(path: Path, blob: bytes) -> dict[str, Any]:
    from kvtc_vllm.codec.container import DTYPES, SectionKind, parse
    from kvtc_vllm.codec.entropy import BY_CODER_ID
    from kvtc_vllm.codec.registry import name_of

    try:
        info = parse(blob)
    except ContainerError as error:
        raise ContainerError(error.reason, f"{path}: {error}") from error
    header = info.header
    dtype = DTYPES.get(header.dtype_code)
    width = header.head_size + header.head_size_v
    raw = header.tokens * header.num_layers * header.num_kv_heads * width
    raw *= dtype.itemsize if dtype is not None else 0
    return {
        "codec": name_of(header.codec_id) or f"unknown ({header.codec_id})",
        "target_ratio": header.ratio,
        "tokens": f"{header.start}..{header.start + header.tokens - 1}",
        "sink_tokens": header.sinks,
        "layers": header.num_layers,
        "kv_heads": header.num_kv_heads,
        "head_size": f"{header.head_size} (K), {header.head_size_v} (V)",
        "layer_groups": header.num_layer_groups,
        "cache_dtype": str(dtype).removeprefix("torch."),
        "artifact": header.artifact.hex(),
        "identity": header.identity.hex(),
        "raw_bytes": raw,
        "stored_bytes": info.blob_length,
        "ratio": round(raw / info.blob_length, 2),
        "sections": [
            {
                "section": f"{_name(SectionKind, s.kind)} group {s.group}",
                "coder": BY_CODER_ID[s.coder_id].name if s.coder_id in BY_CODER_ID else s.coder_id,
                "units": len(s.units),
                "planned_bytes": s.raw_length,
                "stored_bytes": s.stored_length,
            }
            for s in info.sections
        ],
    }


def describe_tier(root: Path) -> dict[str, Any]:
    """Namespaces of a disk tier with their sizes and ages. Raises DiskError."""
    survey = Survey(root)
    found = list(survey.summaries())
    return {
        "chunks": sum(n.chunks for n in found),
        "disk_bytes": sum(n.used for n in found),
        "namespaces": [_namespace(n) | {"ratio": _ratio(survey, n.name)} for n in found],
    }


def _namespace(found: NamespaceSummary) -> dict[str, Any]:
    """What a namespace is, by its record, and what it holds."""
    record = found.record
    return {
        "namespace": found.name,
        "model": record.model if record else "unknown",
        "artifact": record.artifact if record else "unknown",
        "codec": record.codec if record else "unknown",
        "target_ratio": record.ratio if record else 0.0,
        "dtype": record.dtype if record else "unknown",
        "rank": f"{record.rank} of {record.tp_size}" if record else "unknown",
        "vllm_version": record.vllm_version if record else "unknown",
        "created": _time(record.created) if record else "unknown",
        "generation": record.generation if record else "unknown",
        "in_use": found.in_use,
        "facts": record.facts if record else {},
        "chunks": found.chunks,
        "references": found.references,
        "stored_bytes": found.stored,
        "disk_bytes": found.used,
        "hits": found.hits,
        "least_recent_use": _time(found.oldest),
        "most_recent_use": _time(found.newest),
        "temporaries": found.temporaries,
    }


def _ratio(survey: Survey, namespace: str) -> float:
    """Uncompressed over stored bytes of the most recently used chunks; 0 if none is readable."""
    raw = stored = 0
    for chunk in survey.chunks(namespace)[-RATIO_SAMPLE:]:
        # One that vanishes meanwhile or is damaged is `kvtc verify`'s business.
        with suppress(DiskError, ContainerError):
            blob = survey.read(namespace, chunk.key)
            described = _describe(Path(survey.path(namespace, chunk.key)), blob)
            raw += described["raw_bytes"]
            stored += described["stored_bytes"]
    return round(raw / stored, 2) if stored else 0.0


def _time(seconds: float) -> str:
    if not seconds:
        return "never"
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _name(kinds: Any, value: int) -> str:
    try:
        return str(kinds(value).name).lower()
    except ValueError:
        return f"kind {value}"
