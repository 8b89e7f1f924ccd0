"""Networks: Latte for class labels and for text, codecs, text encoder, adapters, and reading of weights.

This package imports no other folder of the repository, and neither diffusers nor transformers on import.
"""

from .latte import Latte, LatteConfig, Route

__all__ = ["Latte", "LatteConfig", "Route"]
