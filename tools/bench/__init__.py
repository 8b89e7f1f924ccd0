"""Benchmarks, each against a reference timed in the same run: `python -m tools.bench --help`."""
