"""KV that neither the engine's cache nor this tier gave a request: another connector loaded it.

Beside another connector (vLLM's `MultiConnector`) a request may begin behind a prefix that some
other engine computed. Nobody here can tell by what, so it has no name.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvtc_vllm.offload.block_tables import StepProgress


class Origins:
    """Used by the scheduler's thread only. boundary: tokens, see `CacheGeometry`."""

    def __init__(self, boundary: int) -> None:
        self._boundary = boundary
        self._given: dict[str, int] = {}

    def begins(self, request_id: str, tokens: int) -> None:
        """Note that vLLM's cache and our load give a request so many tokens before its first step.

        The engine may have some more of them in a block that is not full.
        """
        self._given[request_id] = tokens

    def of_others(self, progress: Mapping[str, StepProgress]) -> list[str]:
        """Requests whose first step this is, and that have more than was given."""
        first = [request_id for request_id in self._given if request_id in progress]
        return [
            request_id
            for request_id in first
            if progress[request_id].computed >= self._given.pop(request_id) + self._boundary
        ]

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that ended."""
        self._given.pop(request_id, None)
