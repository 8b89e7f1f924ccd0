"""Helpers that every other folder may use: checks, files that survive a kill, console output. Imports none of ours."""
