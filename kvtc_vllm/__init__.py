"""KVTC (KV Cache Transform Coding, arXiv 2511.01815) as a vLLM KV connector."""

__version__ = "0.2.0"
