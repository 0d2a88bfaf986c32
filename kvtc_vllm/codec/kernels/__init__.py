"""Fast paths of the codec: Triton kernels behind plain functions of tensors.

The CPU reference (`rope`, `transform`, `quantizers`, `payload`) defines what they compute:
integer codes and elementwise float32 results are equal bit for bit, only matrix products may
differ in the order of their sums. Only `chunks`, `paged` and `streams` are imported unless a fast
path is asked for: importing the others needs Triton.

Stream contract, of every function in this package: kernels run on the caller's current stream
(on CPU: at once, in Triton's interpreter), nothing waits for the device unless the docstring
says so, and tensors passed in must stay alive and unchanged until that work has run.
"""
