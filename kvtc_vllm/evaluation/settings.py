"""What of a method can be set in its name, as in `snapkv/keep=0.25/pooling=5`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple


class Setting(NamedTuple):
    """One number. value: the method's own; least, most: what may be given; whole: no fractions."""

    value: float
    least: float
    most: float
    whole: bool = False


Settings = Mapping[str, Setting]
"""By name."""
KEEP = Setting(1 / 8, 1 / 1024, 1)
"""Share of the tokens that stay or are read; the default is that of the KVTC paper's comparison."""


def parse(text: str) -> tuple[str, dict[str, float]]:
    """The method's name and what is set. Raises ValueError."""
    name, *parts = text.split("/")
    given: dict[str, float] = {}
    for part in parts:
        key, equals, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or value != value:
            raise ValueError(f"{name}: {part!r} is no setting; give one such as keep=0.25")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        given[key] = value
    return name, given


def resolve(name: str, known: Settings, given: Mapping[str, float]) -> dict[str, float]:
    """All settings of a method, with what is given. Raises ValueError.

    Whole numbers are int.
    """
    for key, value in given.items():
        if key not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"{name}: there is no setting {key!r}; it has {names}")
        setting = known[key]
        if not setting.least <= value <= setting.most or (setting.whole and value != int(value)):
            kind = "a whole number" if setting.whole else "a number"
            raise ValueError(
                f"{name}: {key}={value:g} is not {kind} from {setting.least:g} to {setting.most:g}"
            )
    wanted = {key: given.get(key, setting.value) for key, setting in known.items()}
    return {key: int(value) if known[key].whole else value for key, value in wanted.items()}


class Budgeted:
    """A method with a budget of tokens. Instances have no state.

    given: values of `settings`, by name. Raises ValueError for others.
    """

    name: ClassVar[str]
    """Key in the registry of its kind."""
    source: ClassVar[str]
    """Paper, and the settings followed."""
    settings: ClassVar[Settings] = {"keep": KEEP}

    def __init__(self, **given: float) -> None:
        self.values = resolve(self.name, self.settings, given)

    def budget(self, tokens: int) -> int:
        """How many of `tokens` (at least 1) it may keep or read for a layer's head; at least 1."""
        return max(1, int(tokens * self.values["keep"]))
