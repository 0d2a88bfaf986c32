"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvtc_vllm.config import ConfigError


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Declare `--engine`, to be read with `parse_engine`."""
    parser.add_argument(
        "--engine",
        default="{}",
        metavar="JSON",
        help='further vllm.LLM arguments, such as {"tensor_parallel_size": 2}',
    )


def parse_engine(text: str) -> dict[str, Any]:
    """The arguments that `--engine` gives. Raises ConfigError."""
    try:
        engine = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--engine {text!r} is not JSON: {error}") from None
    if not isinstance(engine, dict):
        raise ConfigError(f'--engine {text!r}: give an object, such as {{"max_model_len": 8192}}')
    return engine
