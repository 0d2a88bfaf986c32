"""Make a disk tier smaller: by size, by age, by namespace.

    kvtc gc DIR                        list the ended generations
    kvtc gc DIR --ended                remove them
    kvtc gc DIR --capacity 50GiB       evict the least recently used until it fits
    kvtc gc DIR --unused-for 30d       remove chunks not used for that long (m, h, d)
    kvtc gc DIR --keep 3fa9 --keep 81  remove every namespace whose name starts otherwise

An engine whose cache is reset goes on in a namespace that only it can name. Once that engine has
ended, nothing there is ever used again: an ended generation. One in use is never taken for one.

Exit status 1 if the capacity cannot be reached. Always removes the temporaries of dead writers,
corrects the ledger and lists the ended generations that are left. Safe while engines run: what is
removed is a miss to them. `kvtc inspect DIR` lists the namespaces.
"""

from __future__ import annotations

import argparse
import re
import sys
import time

from kvtc_vllm.artifact.text import printable
from kvtc_vllm.config import ConfigError, parse_bytes
from kvtc_vllm.tiers.disk.layout import disk_bytes
from kvtc_vllm.tiers.disk.survey import NamespaceSummary, Survey

_AGE = re.compile(r"(\d+(?:\.\d+)?)([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("directory", help="root directory of a disk tier")
    parser.add_argument("--capacity", help='bytes over all namespaces, such as "50GiB"')
    parser.add_argument("--unused-for", metavar="AGE", help="such as 90m, 12h or 30d")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAMESPACE", help="a name or its beginning"
    )
    parser.add_argument("--ended", action="store_true", help="remove the ended generations")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace) -> int:
    """Print one line per removal, and one per ended generation that is left."""
    capacity = None if args.capacity is None else parse_bytes("--capacity", args.capacity)
    age = None if args.unused_for is None else _age(args.unused_for)
    survey = Survey(args.directory)
    fits = True
    if args.keep:
        _drop_others(survey, args.keep, args.dry_run)
    if args.ended:
        _drop_ended(survey, args.dry_run)
    if age is not None:
        _remove_unused(survey, age, args.dry_run)
    if capacity is not None:
        fits = _shrink(survey, capacity, args.dry_run)
    if not args.dry_run:
        survey.clean()
    if not args.ended:
        _list_ended(survey, args.directory)
    return 0 if fits else 1


def _drop_others(survey: Survey, keep: list[str], dry_run: bool) -> None:
    names = survey.namespaces()
    for prefix in keep:
        if not any(name.startswith(prefix.lower()) for name in names):
            raise ConfigError(f"--keep {prefix}: no namespace has that name; nothing was removed")
    for name in names:
        if name.startswith(tuple(prefix.lower() for prefix in keep)):
            continue
        chunks = len(survey.chunks(name)) if dry_run else survey.drop(name)
        print(f"namespace {name}: {chunks} chunks {_done(dry_run)}")


def _drop_ended(survey: Survey, dry_run: bool) -> None:
    for found in survey.ended():
        if not dry_run:
            survey.drop(found.name)
        print(f"{_describe(found)}: {_done(dry_run)}")


def _list_ended(survey: Survey, directory: str) -> None:
    ended = list(survey.ended())
    for found in ended:
        print(_describe(found))
    if ended:
        print(f"no engine can use these again: `kvtc gc {directory} --ended` removes them")


def _describe(ended: NamespaceSummary) -> str:
    record = ended.record
    last = ended.newest or (record.created if record else 0)
    age = f"last used {_human(time.time() - last)} ago" if last else "never used"
    model = record.model if record else "unknown"
    return (
        f"ended generation {ended.name}: {ended.chunks} chunks, {ended.used} bytes, {age}, "
        f"model {printable(model)}"
    )


def _remove_unused(survey: Survey, age: float, dry_run: bool) -> None:
    oldest = (time.time() - age) * 1e9
    for name in survey.namespaces():
        keys = [chunk.key for chunk in survey.chunks(name) if chunk.mtime_ns < oldest]
        if keys:
            chunks = len(keys) if dry_run else survey.remove(name, keys)
            print(f"namespace {name}: {chunks} unused chunks {_done(dry_run)}")


def _shrink(survey: Survey, capacity: int, dry_run: bool) -> bool:
    """False if what is left is more than the capacity."""
    if dry_run:
        used = sum(
            disk_bytes(chunk.length)
            for name in survey.namespaces()
            for chunk in survey.chunks(name)
        )
        print(f"{max(0, used - capacity)} bytes over the capacity {_done(dry_run)}")
        return True
    chunks, size, left = survey.shrink(capacity)
    print(f"{chunks} chunks, {size} bytes evicted")
    if left:
        print(
            f"{left} bytes above the capacity are left: what they belong to is being written or "
            "cannot be removed",
            file=sys.stderr,
        )
    return not left


def _age(text: str) -> float:
    match = _AGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--unused-for {text!r}: give a number with m, h or d, such as 30d")
    return float(match.group(1)) * _SECONDS[match.group(2)]


def _human(seconds: float) -> str:
    """An age as `--unused-for` takes it."""
    unit = next((u for u in "dh" if seconds >= _SECONDS[u]), "m")
    return f"{round(max(0.0, seconds) / _SECONDS[unit], 1):g}{unit}"


def _done(dry_run: bool) -> str:
    return "would be removed" if dry_run else "removed"
