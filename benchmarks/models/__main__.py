"""Makes a public language model: prints its directory, and what happens on standard error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import ModelError, gemma3, smollm2

MODELS = {"smollm2": smollm2, "gemma3": gemma3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.models", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where (default: the user's cache)")
    options = parser.parse_args(arguments)
    try:
        print(MODELS[options.model](options.out))
    except ModelError as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
