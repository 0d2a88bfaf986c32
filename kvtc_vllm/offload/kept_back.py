"""Worker side of stores that were put off: what only the paged cache holds, and its proofs.

A chunk that is stored some steps after it was computed must have been computed by what its name
stands for *then*. So the weights are compared in the step that completes it as well, and a store
holds only if all comparisons do that have no outcome yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from kvtc_vllm.offload.messages import StoreItem
from kvtc_vllm.offload.names import Proof
from kvtc_vllm.tiers.keys import RecordKey


class KeptBack:
    """Engine's thread only, but for `holds`."""

    def __init__(self) -> None:
        self._items: dict[RecordKey, StoreItem] = {}
        self._open: list[Proof] = []

    def keep(self, items: Sequence[StoreItem], proof: Proof) -> None:
        """Note stores that are put off. proof: of the step that completes their chunks."""
        self._items.update((item.key, item) for item in items)
        self._open.append(proof)

    def holds(self, proof: Proof) -> None:
        """Note that a proof was found to hold. Any thread."""
        with suppress(ValueError):  # not one of a step that kept something back
            self._open.remove(proof)

    def forget(self, keys: Iterable[RecordKey]) -> None:
        """These are stored now, or not in their blocks any more."""
        for key in keys:
            self._items.pop(key, None)

    def prove(self, proof: Proof) -> Proof:
        """That what `proof` says holds, and what was said since chunks were kept back."""
        samples = [sample for earlier in list(self._open) for sample in earlier.samples]
        return Proof(proof.step, proof.epoch, (*proof.samples, *samples)) if samples else proof

    def take_all(self) -> list[StoreItem]:
        """Every store that was put off and did not come, the newest first."""
        items = list(reversed(self._items.values()))
        self._items.clear()
        return items

    def clear(self) -> None:
        """Their names were given up."""
        self._items.clear()
        self._open.clear()
