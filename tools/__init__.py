"""Command lines: thin mains over library functions."""
