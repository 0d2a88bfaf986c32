"""The vLLM side: a KV connector that keeps offloaded blocks KVTC-encoded.

`register` is the `vllm.general_plugins` entry point. vLLM runs it in the API
server, the engine core and every worker, so it must be cheap and idempotent.
"""

from __future__ import annotations

NAME = "KVTCConnector"
MODULE = "kvtc_vllm.connector.connector"


def register() -> None:
    """Make the connector known to vLLM by name."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
