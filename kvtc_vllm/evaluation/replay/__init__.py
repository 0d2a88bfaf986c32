"""Prefixes stored with one method in a vLLM engine, dropped, and reloaded."""
