"""Networks: Latte for class labels and for text, codecs, text encoder, adapters, and reading of weights.

Imports only `common` from this repository; diffusers and transformers are imported where they are used.
"""

from .latte import Latte, LatteConfig, Route

__all__ = ["Latte", "LatteConfig", "Route"]
