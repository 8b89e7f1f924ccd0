"""Metrics of generated videos under named protocols."""
