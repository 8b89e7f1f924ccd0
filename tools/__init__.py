"""Command lines; each is a thin main over functions of the library."""
