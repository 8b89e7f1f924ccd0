"""The only glue: knows models, diffusion and datasets; none of them knows it."""
