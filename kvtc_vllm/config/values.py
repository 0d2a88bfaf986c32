"""Sizes, the one error of a configuration, and any value in one short line of it."""

from __future__ import annotations

import os
import re
import reprlib
from decimal import Decimal
from pathlib import Path

# No number of more digits is a size; without a limit, one of 400 has no float and one of 5,000
# no int.
_SIZE = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([KMGTP]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50}

MOST_SHOWN = 200
"""Characters of a value or of what is wrong with it."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = MOST_SHOWN


class ConfigError(ValueError):
    """A configuration key has a value that can't be used."""


def parse_bytes(field: str, value: int | str) -> int:
    """Bytes from 1234, "8GiB", "500 MB". Raises ConfigError."""
    if isinstance(value, int):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ConfigError(
            f'{field}={shown(value)} is not a size; give bytes or a string such as "8GiB"'
        )
    unit = (match.group(2) or "").lower()
    factor = _BINARY_UNITS.get(unit) or _UNITS[unit]
    return int(Decimal(match.group(1)) * factor)


def size_text(size: int) -> str:
    """In the largest binary unit that divides it: "8GiB"."""
    fitting = (unit for unit in reversed(_BINARY_UNITS) if size and size % _BINARY_UNITS[unit] == 0)
    unit = next(fitting, None)
    return str(size) if unit is None else f"{size // _BINARY_UNITS[unit]}{unit.capitalize()}B"


def shown(value: object) -> str:
    """A value in one short line, whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # integers of more than 4,300 digits have no text
        return f"an {type(value).__name__} too long to print"


def check_path(key: str, text: str, absolute: bool = False) -> None:
    """Raise ConfigError for what is no path.

    absolute: also for one that is another in another working directory.
    """
    if not text:
        kind = "an absolute path" if absolute else "a path"
        raise ConfigError(f"{key}={shown(text)} is empty; give {kind}, or leave the key out")
    if "\0" in text:
        raise ConfigError(f"{key}={shown(text)} has a NUL character, which no path may have")
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={shown(text)} has characters that no file name here may have"
        ) from None
    except RuntimeError:
        raise ConfigError(
            f"{key}={shown(text)}: the home directory is not known; give an absolute path"
        ) from None
    if absolute and not path.is_absolute():
        raise ConfigError(
            f"{key}={shown(text)} is not absolute; give a path such as /var/cache/kvtc"
        )
