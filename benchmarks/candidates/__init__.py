"""Kernels that are right but not yet proven to be fast: `python -m benchmarks attention` times them on a GPU.

One moves to `models/` when it is ahead there. Nothing in the network imports this package.
"""
