"""`make demo`: conversations evicted from vLLM's cache and reloaded through KVTC."""
