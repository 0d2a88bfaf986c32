"""Facts on standard output: YAML for people and programs, or JSON."""

from __future__ import annotations

import json
from typing import Any

import yaml


def print_facts(facts: Any, as_json: bool) -> None:
    """Print dicts, lists and plain values, in their order."""
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        print(yaml.dump(plain(facts), Dumper=_Dumper, sort_keys=False, width=100), end="")


def plain(value: Any) -> Any:
    """The same, of what YAML has words for: tuples become lists."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes equal objects again instead of a reference to the first."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
