"""Sampling: `generate.Generator`, the command sample/sample.py and video writers."""
