"""Quality of what a reload through the tier gives back, and baselines to compare it with.

`processes` runs methods, each in a child process; `replay` stores and reloads in a vLLM engine,
`prefixes` in transformers; `reporting` makes figures and tables of what they record. What is
compared: `methods`, `baselines`, `ablations`. With which text: `tasks`, `data`.
"""
