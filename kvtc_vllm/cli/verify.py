"""Check every file of a disk tier: checksum, structure, namespace and name.

    kvtc verify DIR [--delete]

Exit status 1 if a bad file was found (and, with --delete, removed). Safe while engines run:
a chunk that vanishes meanwhile is no fault.
"""

from __future__ import annotations

import argparse
import json

from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.tiers.disk import DiskError
from kvtc_vllm.tiers.disk.layout import check_blob
from kvtc_vllm.tiers.disk.survey import Survey
from kvtc_vllm.tiers.keys import RecordKey


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("directory", help="root directory of a disk tier")
    parser.add_argument("--delete", action="store_true", help="remove the bad files")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line per bad file and one per namespace."""
    survey = Survey(args.directory)
    facts = []
    for namespace in survey.namespaces():
        chunks = survey.chunks(namespace)
        bad = _bad_chunks(survey, namespace, [chunk.key for chunk in chunks])
        removed = survey.remove(namespace, list(bad)) if bad and args.delete else 0
        facts.append(
            {
                "namespace": namespace,
                "chunks": len(chunks),
                "removed": removed,
                "bad": list(bad.values()),
            }
        )
        if not args.json:
            for one in bad.values():
                print(f"BAD  {one['path']}: {one['reason']}")
            note = f", {removed} removed" if bad and args.delete else ""
            print(f"{namespace}: {len(chunks)} chunks, {len(bad)} bad{note}")
    if args.json:
        print(json.dumps(facts, indent=1))
    return 1 if any(one["bad"] for one in facts) else 0


def _bad_chunks(
    survey: Survey, namespace: str, keys: list[RecordKey]
) -> dict[RecordKey, dict[str, str]]:
    """Path and reason of each bad file."""
    bad = {}
    for key in keys:
        path = survey.path(namespace, key)
        try:
            blob = survey.read(namespace, key)
            check_blob(blob, bytes.fromhex(namespace), key)
            parse(blob)
        except (ContainerError, DiskError) as error:
            if error.reason != "missing":
                bad[key] = {"path": str(path), "reason": str(error)}
    return bad
