"""Version 2 of the codec, "kvtc2": one step for all coefficients, entropy coded, sinks finer.

`plan` is its section coder, `codes` the bytes that it makes, `codec` the codec.
"""
