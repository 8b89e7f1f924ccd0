"""Distances between sets of videos."""
