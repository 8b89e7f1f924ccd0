"""Evaluation: metrics of generated videos under named protocols."""
