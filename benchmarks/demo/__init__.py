"""`make demo` and `make demo-quick`: conversations evicted from vLLM's cache and reloaded."""
