"""Correct kernels that are not yet proven to be faster: `python -m benchmarks attention` times them on a GPU.

A kernel moves to `models/` once it is faster on one. The networks do not import this package.
"""
