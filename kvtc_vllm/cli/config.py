"""Print the exact `--kv-transfer-config` JSON of a preset.

    vllm serve MODEL --kv-transfer-config "$(kvtc config kvtc-16x)"

KEY=VALUE overrides a key of the preset, such as memory_bytes=64GiB. Without a preset, the command
lists them.

    kvtc config --describe

prints every key with its default, its allowed values and its meaning; `kvtc config lmcache
--describe` does it for the settings below LMCache.

    kvtc config lmcache [fs | fs-native | redis | s3] model=MODEL [KEY=VALUE ...]

prints the commands of an LMCache server with KVTC below it and of a vLLM that uses it. KEY is a
setting of the codec (ratio, artifact, ...), l2.KEY of the L2 adapter, server.KEY of the server;
route=plugin needs no server module.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence

import yaml

from kvtc_vllm.config import (
    ConfigError,
    ConfigKey,
    describe,
    kv_transfer_config,
    preset_description,
    preset_names,
)
from kvtc_vllm.config.keys import describe_keys
from kvtc_vllm.lmcache.command import commands, lmcache_presets
from kvtc_vllm.lmcache.settings import LMCacheSettings

LMCACHE = "lmcache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("preset", nargs="?", help="name of a preset; none: list them")
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="keys to change")
    parser.add_argument("--describe", action="store_true", help="print a table of all keys")
    parser.add_argument("--json", action="store_true", help="print that table as JSON")


def run(args: argparse.Namespace) -> int:
    """Print JSON, commands, the list of presets or the table of keys."""
    if args.describe:
        keys = describe_keys(LMCacheSettings) if args.preset == LMCACHE else describe()
        print(json.dumps([key._asdict() for key in keys], indent=1) if args.json else _table(keys))
        return 0
    if args.preset is None:
        for name in preset_names():
            print(f"{name:12} {preset_description(name)}")
        return 0
    if args.preset == LMCACHE:
        return _print_lmcache(args.override)
    print(json.dumps(kv_transfer_config({"preset": args.preset, **_values(args.override)})))
    return 0


def _table(keys: Sequence[ConfigKey]) -> str:
    """The keys in Markdown."""
    rows = [f"| `{key.name}` | {key.default} | {key.values} | {key.meaning} |" for key in keys]
    return "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])


def _print_lmcache(words: list[str]) -> int:
    if not words:
        for name, description in lmcache_presets().items():
            print(f"{LMCACHE} {name:12} {description}")
        return 0
    for command in commands(words[0], _values(words[1:])):
        print(shlex.join(command))
    return 0


def _values(overrides: list[str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"{override!r} is not KEY=VALUE, such as memory_bytes=64GiB")
        try:
            values[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"the value of {key} is not YAML: {value[:80]!r}") from None
    return values
