"""Makes caches of latents and of text features: one writer for both."""
