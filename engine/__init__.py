"""Training: joins models, diffusion and datasets, none of which imports it."""
