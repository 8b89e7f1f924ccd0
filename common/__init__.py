"""Helpers for all other packages, none of which it imports: checks, crash-safe files, console output."""
