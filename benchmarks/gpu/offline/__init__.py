"""What can be found out about the GPU path without a GPU: compiled kernels and host times."""
