"""What the engine has begun to compute and not put into a step yet."""

from __future__ import annotations

from collections.abc import Mapping


class PrefillQueue:
    """Prompt tokens by request. Used by the scheduler's thread only.

    vLLM goes on with requests that run before it takes new ones, so these tokens are computed
    before those of any request that still waits.
    """

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self.tokens = 0
        """Of all requests."""

    def begin(self, request_id: str, tokens: int) -> None:
        """Take note that the request's last `tokens` tokens are computed from now on."""
        self.forget(request_id)
        if tokens > 0:
            self._left[request_id] = tokens
            self.tokens += tokens

    def planned(self, scheduled: Mapping[str, int]) -> None:
        """Take note of a step. scheduled: its tokens by request."""
        for request_id in [name for name in self._left if name in scheduled]:
            self.begin(request_id, self._left[request_id] - scheduled[request_id])

    def forget(self, request_id: str) -> None:
        """Drop a request that ended or is not known."""
        self.tokens -= self._left.pop(request_id, 0)
