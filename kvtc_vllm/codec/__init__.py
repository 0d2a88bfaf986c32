"""Pure tensors -> bytes -> tensors. Imports torch and numpy, never vLLM."""
