"""The demo and what its assets were made with."""
