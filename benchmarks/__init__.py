"""Measurements of this project, and kernels that wait for theirs."""
