"""Storage methods by name: how the connector is set up to store and reload with each.

A method is our own codec at some plan, raw offload, or one of `baselines/`. All
run through the same connector, tier and replay, with the same recent window.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvtc_vllm.config import DEFAULT_RECENT_WINDOW
from kvtc_vllm.evaluation.baselines import BASELINES
from kvtc_vllm.evaluation.eviction import EVICTIONS

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
    whole_prompt: bool = False
    """One chunk for a whole prefix."""
    eviction: str | None = None
    """Name of a token eviction. It is run by transformers: it drops tokens, and stores none."""
    window: int = DEFAULT_RECENT_WINDOW
    """Recent window in tokens."""
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS

    def connector_config(self, chunk_tokens: int) -> dict[str, Any]:
        """`kv_connector_extra_config` for the bench's connector."""
        extra: dict[str, Any] = {
            "codec": self.codec,
            "recent_window": self.window,
            "chunk_tokens": chunk_tokens,
            "memory_bytes": _MEMORY_BYTES,
            "staging_bytes": _MEMORY_BYTES,
            # Answers are not part of what is replayed; counters then match exactly.
            "store_decode": False,
            # Everything that can be reloaded must be, however slowly.
            "load_gate": False,
            "encode_share": 1.0,
            "evaluation": self.override,
        }
        if self.ratio is not None:
            extra["ratio"] = self.ratio
            if self.artifact is not None:
                extra["artifact"] = self.artifact
        return extra

    def can_share(self, other: Method) -> bool:
        """Whether both can share an exact pass: they store the same tokens in the same chunks."""
        mine, theirs = (
            (method.window, method.chunk_tokens, method.whole_prompt) for method in (self, other)
        )
        return mine == theirs and self.eviction is None and other.eviction is None


def names() -> list[str]:
    """What `find` accepts, with <ratio> standing for any of the artifact."""
    ours = [
        f"{codec}-<ratio>x{label}" for codec in ("kvtc", "kvtc2") for label in ("", "@<artifact>")
    ]
    return ["raw", *ours, *BASELINES, *EVICTIONS]


def find(name: str, artifacts: Mapping[str, str] | None = None) -> Method:
    """The method of this name. Raises MethodError.

    artifacts: directories by name; "" is the one of methods that name none, which without it
    is looked up in the registry.
    """
    artifacts = artifacts or {}
    if name == "raw":
        return Method("raw", "bit-exact")
    if match := _KVTC.fullmatch(name):
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
    if name in BASELINES:
        baseline = BASELINES[name]
        return Method(
            name,
            baseline.source,
            override={"baseline": name},
            whole_prompt=baseline.whole_prompt,
        )
    if name in EVICTIONS:
        return Method(name, EVICTIONS[name].source, eviction=name)
    raise MethodError(f"method {name!r} is not known; give one of {', '.join(names())}")


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
