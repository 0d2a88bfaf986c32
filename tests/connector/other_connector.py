"""A connector of somebody else's, beside ours in a `MultiConnector`.

It says that it loads prompts from another engine, and leaves their blocks as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)

OFFERED = {"tokens": 0}
"""Of each prompt; 0 for none."""


class OthersHandshake(KVConnectorHandshakeMetadata):
    """What it wants the scheduler's side to know."""


@dataclass
class Orders(KVConnectorMetadata):
    requests: set[str] = field(default_factory=set)


class OtherConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        tokens = max(0, min(OFFERED["tokens"], request.num_tokens - 1) - computed)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, tokens: int) -> None:
        if tokens:
            self._requests.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        orders, self._requests = Orders(self._requests), set()
        return orders

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def get_handshake_metadata(self) -> OthersHandshake:
        return OthersHandshake()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Orders)
        self._requests |= orders.requests

    def get_finished(self, finished: set[str]) -> tuple[None, set[str] | None]:
        done, self._requests = self._requests, set()
        return None, done or None

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...
