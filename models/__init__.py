"""Networks: Latte, its text-free parts, and the codecs between pixels and latents.

Nothing here imports another folder of this repository, and importing this package loads neither diffusers
nor transformers.
"""

from .latte import Latte, LatteConfig, Route

__all__ = ["Latte", "LatteConfig", "Route"]
