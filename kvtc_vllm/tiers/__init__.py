"""Where encoded chunks are kept: arenas, indexes, eviction policies, byte budgets.

Imports neither vLLM nor CUDA.
"""
