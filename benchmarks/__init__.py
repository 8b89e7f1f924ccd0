"""Benchmarks, each a ratio to a reference timed in the same run, and kernels that are not yet proven to be fast."""
