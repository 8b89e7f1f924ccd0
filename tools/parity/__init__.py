"""The comparisons behind `tools.check_parity`."""
