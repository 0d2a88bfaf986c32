"""Print the exact `--kv-transfer-config` JSON of a preset.

    vllm serve MODEL --kv-transfer-config "$(kvtc config kvtc-16x)"

Fields are overridden with KEY=VALUE, such as memory_bytes=64GiB.
"""

from __future__ import annotations

import argparse
import json

import yaml

from kvtc_vllm.config import ConfigError, kv_transfer_config, preset_description, preset_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("preset", nargs="?", help="name of a preset; none: list them")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="fields to change")


def run(args: argparse.Namespace) -> int:
    """Print JSON, or the list of presets."""
    if args.preset is None:
        for name in preset_names():
            print(f"{name:12} {preset_description(name)}")
        return 0
    extra: dict[str, object] = {"preset": args.preset}
    for override in args.override:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r} is not KEY=VALUE, such as memory_bytes=64GiB")
        extra[key] = yaml.safe_load(value)
    print(json.dumps(kv_transfer_config(extra)))
    return 0
