"""The fast way of version 1 on a CPU: fused loops by numba, products of int8 where they are faster.

What quantisers, packing and payload do here is `loops`, bit for bit; the coefficients come from
`products`, whose precision `precision` chooses. Importing `loops` imports numba, so it is imported
late: vLLM 0.32 for CPU does not start in a process that has imported numba before it.
"""
