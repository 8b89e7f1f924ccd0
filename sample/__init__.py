"""Sampling: `generate.Generator`, the command sample/sample.py and the writers of videos."""
