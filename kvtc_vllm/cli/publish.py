"""Upload an artifact to the Hugging Face hub, with its card and report as the model card.

    kvtc publish ~/.local/share/kvtc/calibrations/my-model/tp1-all-0a1b2c3d hf:ORG/REPO

Prints the name by which engines find it: `registry: hf:ORG/REPO@COMMIT`. The token is that of `hf
auth login` or of HF_TOKEN.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvtc_vllm.artifact.hub import publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("artifact", type=Path, help="directory of the artifact")
    parser.add_argument("repository", help="hf:ORG/REPO, made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if it is made: not public")


def run(args: argparse.Namespace) -> int:
    """Check, upload, print the pinned name."""
    print(publish(args.artifact, args.repository, private=args.private))
    return 0
