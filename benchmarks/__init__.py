"""Benchmarks, most of them against a reference measured in the same run, and kernels not yet proven to be fast."""
