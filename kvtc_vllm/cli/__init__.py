"""The `kvtc` command. One file per sub-command, one row in `COMMANDS`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from kvtc_vllm import __version__
from kvtc_vllm.artifact.text import printable
from kvtc_vllm.calibration.documents import DataError
from kvtc_vllm.cli import (
    artifacts,
    bench,
    calibrate,
    config,
    doctor,
    eval,
    fit,
    gc,
    inspect,
    plan,
    publish,
    verify,
)
from kvtc_vllm.codec.errors import CodecError
from kvtc_vllm.config import ConfigError
from kvtc_vllm.load_test.errors import LoadTestError
from kvtc_vllm.planning.errors import PlanError
from kvtc_vllm.tiers.disk import DiskError

COMMANDS = {
    "artifacts": artifacts,
    "bench": bench,
    "calibrate": calibrate,
    "config": config,
    "doctor": doctor,
    "eval": eval,
    "fit": fit,
    "gc": gc,
    "inspect": inspect,
    "plan": plan,
    "publish": publish,
    "verify": verify,
}

EXPECTED = (CodecError, ConfigError, DataError, DiskError, LoadTestError, PlanError)
"""Errors of the user's input; each is printed as one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status. Expected errors print one line."""
    parser = argparse.ArgumentParser(prog="kvtc", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"kvtc-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    args = parser.parse_args(argv)
    try:
        status = int(COMMANDS[args.command].run(args))
        # Here, where a reader that has gone is still caught.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has seen enough, as `head` does. What is left to write goes nowhere, or the
        # interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except EXPECTED as error:
        text = "\n".join(printable(line) for line in str(error).split("\n"))
        print(f"kvtc {args.command}: {text}", file=sys.stderr)
        return 2
