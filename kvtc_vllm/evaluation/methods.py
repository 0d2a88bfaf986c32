"""Storage methods by name: how the connector is set up to store and reload with each.

A method is our own codec at some plan, raw offload, or one of `baselines/`. All
run through the same connector, tier and replay, with the same recent window. Methods that drop or
recall tokens (`eviction/`, `recall/`) run in transformers instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvtc_vllm.config import DEFAULT_RECENT_WINDOW
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.baselines.fitted import FittedBaseline
from kvtc_vllm.evaluation.eviction import EVICTIONS
from kvtc_vllm.evaluation.recall import RECALLS
from kvtc_vllm.evaluation.settings import parse, resolve

_KVTC = re.compile(r"(kvtc2?)-(\d+(?:\.\d+)?)x(?:@(.+))?")
_MEMORY_BYTES = 8 << 30
DEFAULT_CHUNK_TOKENS = 128


class MethodError(ValueError):
    """A method's name is not known; the message lists what is."""


@dataclass(frozen=True)
class Method:
    """How to store and reload."""

    name: str
    """As shown in results."""
    plan: str
    """What of the method was set, for people."""
    codec: str = "raw"
    """Or "kvtc" or "kvtc2"."""
    ratio: float | None = None
    """Target ratio, of a codec that has one."""
    artifact: str | None = None
    override: dict[str, Any] = field(default_factory=dict)
    """Fields of `CodecOverride`, for something else in the codec's place."""
    below: str | None = None
    """Name of a baseline that chunks went through before our codec, as a cache of that form."""
    whole_prompt: bool = False
    """One chunk for a whole prefix."""
    tokens: str | None = None
    """Name of an eviction or a recall. It is run by transformers. With a codec: what it leaves is
    coded."""
    settings: dict[str, float] = field(default_factory=dict)
    """Of the baseline, eviction or recall; others have its own values."""
    texts: tuple[str, ...] = ()
    """Calibration text of what is fitted once per model beside our codec, as `kvtc calibrate
    --data` takes it; empty: prose and code of the standard library."""
    sixteen_bits: bool = False
    """Where it shares an exact pass, a cache of float32 stands for one of bfloat16."""
    window: int = DEFAULT_RECENT_WINDOW
    """Recent window in tokens."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    connector: dict[str, Any] = field(default_factory=dict)
    """Further keys of the connector's configuration."""

    def connector_config(self, chunk_tokens: int) -> dict[str, Any]:
        """`kv_connector_extra_config` for the bench's connector.

        What is below our codec must be in `override` by then (`processes/carrier.py`).
        """
        assert self.below is None or self.override
        extra: dict[str, Any] = {
            "codec": self.codec,
            "recent_window": self.window,
            "memory_bytes": _MEMORY_BYTES,
            "staging_bytes": _MEMORY_BYTES,
            # Answers are not part of what is replayed; counters then match exactly.
            "store_decode": False,
            # Each document's bytes are its own, whatever came before.
            "joint": "off",
            "store_policy": "eager",
            # Everything that can be reloaded must be, however slowly.
            "load_gate": False,
            "encode_share": 1.0,
            "evaluation": self.override,
            **self.connector,
        }
        # Without it chunks are whole blocks of every cache group, of this size or more.
        if chunk_tokens != DEFAULT_CHUNK_TOKENS:
            extra["chunk_tokens"] = chunk_tokens
        if self.ratio is not None:
            extra["ratio"] = self.ratio
            if self.artifact is not None:
                extra["artifact"] = self.artifact
        return extra

    def can_share(self, other: Method) -> bool:
        """Whether both can share an exact pass: they store the same tokens in the same chunks."""
        mine, theirs = (
            (method.window, method.chunk_tokens, method.whole_prompt, method.connector)
            for method in (self, other)
        )
        return mine == theirs and (self.tokens is None) == (other.tokens is None)


def names() -> list[str]:
    """What `find` accepts, with <ratio> standing for any of the artifact."""
    ours = [
        f"{codec}-<ratio>x{label}" for codec in ("kvtc", "kvtc2") for label in ("", "@<artifact>")
    ]
    known = ["raw", *ours, *BASELINES, *EVICTIONS, *RECALLS]
    return [*known, "<method>/<setting>=<number>", "<method>+kvtc-<ratio>x"]


def find(name: str, artifacts: Mapping[str, str] | None = None) -> Method:
    """The method of this name. Raises MethodError.

    artifacts: directories by name; "" is the one of methods that name none, which without it
    is looked up in the registry.
    """
    if name == "raw":
        return Method("raw", "bit-exact")
    if _KVTC.fullmatch(name):
        return _ours(name, artifacts or {})
    below, plus, ours = name.partition("+")
    if plus:
        return _composed(below, ours, artifacts or {})
    try:
        key, given = parse(name)
        if key in BASELINES:
            baseline = BASELINES[key]
            resolve(key, baseline.settings, given)
            return Method(
                name,
                _plan(baseline.source, given),
                override={"baseline": key, **({"settings": given} if given else {})},
                whole_prompt=baseline.whole_prompt,
            )
        if key in EVICTIONS:
            source = EVICTIONS[key](**given).source
        elif key in RECALLS:
            source = RECALLS[key](**given).source
        else:
            raise MethodError(f"method {name!r} is not known; give one of {', '.join(names())}")
    except MethodError:
        raise
    except ValueError as error:
        raise MethodError(f"method {name!r}: {error}") from None
    return Method(name, _plan(source, given), tokens=key, settings=given)


def _plan(source: str, given: Mapping[str, float]) -> str:
    changed = ", ".join(f"{key} {value:g}" for key, value in given.items())
    return f"{source}; {changed}" if changed else source


def _ours(name: str, artifacts: Mapping[str, str]) -> Method:
    match = _KVTC.fullmatch(name)
    assert match is not None
    codec, ratio, label = match.group(1), float(match.group(2)), match.group(3) or ""
    if label and label not in artifacts:
        known = ", ".join(filter(None, artifacts)) or "none is"
        raise MethodError(
            f"method {name!r}: no artifact is called {label!r} ({known}); "
            f"give --artifact {label}=DIR"
        )
    plan = f"{ratio:g}x"
    # A space, as in the names of variants: reports draw a line for each.
    shown = f"{codec}-{plan} {label}".strip()
    return Method(shown, plan, codec=codec, ratio=ratio, artifact=artifacts.get(label))


def _composed(below: str, ours: str, artifacts: Mapping[str, str]) -> Method:
    """What `below` leaves, in our codec: tokens that an eviction keeps, or another form of KV."""
    name = f"{below}+{ours}"
    if not _KVTC.fullmatch(ours):
        raise MethodError(f"method {name!r}: after + comes kvtc-<ratio>x or kvtc2-<ratio>x")
    first, second = find(below), _ours(ours, artifacts)
    shown, plan = f"{below}+{second.name}", f"{first.plan}; {second.plan}"
    changes: dict[str, Any] = {"name": shown, "plan": plan, "settings": first.settings}
    if first.tokens in EVICTIONS:
        return replace(second, tokens=first.tokens, **changes)
    plain = first.override.keys() == {"baseline"} and not first.whole_prompt
    if plain and not issubclass(BASELINES[below], FittedBaseline):
        return replace(second, below=below, **changes)
    raise MethodError(
        f"method {name!r}: only {', '.join(EVICTIONS)}, and baselines of single chunks that fit "
        "nothing and have no settings, go below our codec"
    )


def groups(methods: Sequence[Method], share: bool) -> list[list[Method]]:
    """Methods that can share exact passes together, if they are to; else each alone."""
    found: list[list[Method]] = []
    for method in methods:
        together = [own for own in found if share and method.can_share(own[0])]
        if together:
            together[0].append(method)
        else:
            found.append([method])
    return found


def variant(method: Method, suffix: str, **changes: Any) -> Method:
    """A method with something changed, named `<method> <suffix>`."""
    return replace(method, name=f"{method.name} {suffix}", **changes)
