"""List the artifacts that engines would find, in the order of the search.

    kvtc artifacts
    kvtc artifacts --model MODEL --tp 2
    kvtc artifacts --registry hf:ORG/REPO@COMMIT

With --model each says why it does not fit; exit status 1 if none does.
"""

from __future__ import annotations

import argparse
from typing import Any

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import ArtifactCard
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.cli.facts import print_facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--model", help="directory or Hugging Face name in the cache")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument(
        "--registry", action="append", default=[], help="further directories or hf:ORG/REPO@COMMIT"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of YAML")


def run(args: argparse.Namespace) -> int:
    """Print one entry per registry."""
    wanted = None
    if args.model is not None:
        wanted = registry.Wanted(model_identity(args.model), args.tp, args.ratio, args.model)
    places = registry.search_path(args.registry)
    found: list[dict[str, Any]] = [
        {
            "registry": str(place),
            "artifacts": [
                _artifact(str(directory.relative_to(place)), card, wanted)
                for directory, card in registry.scan(place)
            ],
        }
        for place in places
    ]
    print_facts(found, args.json)
    if wanted is None:
        return 0
    return 0 if any(one["fits"] for place in found for one in place["artifacts"]) else 1


def _artifact(name: str, card: ArtifactCard, wanted: registry.Wanted | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "artifact": name,
        "model": card.model_name,
        "identity": card.identity,
        "codec": card.codec_name,
        "tp_size": card.tp_size,
        "ratios": list(card.ratios),
        "created": card.created,
        "bytes": sum(card.size_bytes.values()),
    }
    if wanted is not None:
        reasons = registry.mismatches(card, wanted)
        described |= {"fits": not reasons, "reasons": reasons}
    return described
