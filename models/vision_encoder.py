"""A frozen image encoder of transformers (DINOv2, ViT, ...): frames to one feature for each token of our networks.

Letters: T frames, g tokens along each side of a network's grid, N = g * g, D width of the features.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from common.checks import require
from common.storage import file_sha256

from .autoencoder import CONFIG_FILE
from .hub import find_folder, read_json

PREPROCESSOR = "preprocessor_config.json"  # mean and deviation of the pixels
LEAST_SIDE = 224  # pixels: features of smaller images are poor, so these are enlarged, and their features averaged


class VisionEncoder:
    """The encoder in the folder, or of the hub name, `path`, for networks with `grid` x `grid` tokens per frame.

    Attributes:
        identity: model type and SHA-256 of its files, as JSON values.

    Raises: FileNotFoundError if it is absent; ValueError if it cannot be loaded or is not an image encoder of patches.
    """

    def __init__(self, path: str, grid: int, device: torch.device) -> None:
        folder = find_folder(path, None, "--encoder", [CONFIG_FILE, PREPROCESSOR, "*.safetensors"])
        kind, pixels = read_json(folder / CONFIG_FILE).get("model_type"), read_json(folder / PREPROCESSOR)
        colours = [pixels.get(key) for key in ("image_mean", "image_std")]
        is_complete = all(isinstance(each, list) and len(each) == 3 for each in colours)
        require(is_complete, f"--encoder {path}: {PREPROCESSOR} needs image_mean and image_std of three channels")
        files = [folder / CONFIG_FILE, folder / PREPROCESSOR, *sorted(folder.glob("*.safetensors"))]
        digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
        self.identity = {"type": kind, "sha256": digest}
        from transformers import AutoModel  # slow to import

        try:
            network, report = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--encoder {path} could not be loaded: {reason}") from error
        patch: Any = getattr(network.config, "patch_size", None)
        is_encoder = network.main_input_name == "pixel_values" and isinstance(patch, int)
        require(is_encoder, f"--encoder {path} holds a {kind}, not an image encoder of square patches such as dinov2")
        missing = [key for key in report["missing_keys"] if "pooler" not in key]  # of the class token, unread
        require(not missing, f"--encoder {path} lacks {len(missing)} weights, the first is {''.join(missing[:1])}")
        self.network: Any = network.requires_grad_(False).eval().to(device)
        self.grid, self.factor = grid, math.ceil(LEAST_SIDE / (grid * patch))
        self.side = grid * patch * self.factor  # of the images that it sees: `factor` x `factor` patches per token
        self.mean, self.std = (torch.tensor(each, device=device).view(3, 1, 1) for each in colours)
        option = "interpolate_pos_encoding"  # some encoders need it for images of another size
        self.options = {option: True} if option in inspect.signature(network.forward).parameters else {}

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """Encodes (T, 3, H, W) in [-1, 1] to (T, N, D) fp32: the last hidden states of the patches."""
        images = functional.interpolate(frames, (self.side, self.side), mode="bicubic", antialias=True)
        pixels = ((images.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        tokens = self.network(pixel_values=pixels, **self.options).last_hidden_state.float()
        rows = self.grid * self.factor
        maps = tokens[:, -(rows**2) :].transpose(1, 2).unflatten(2, (rows, rows))  # class and register tokens are first
        return functional.avg_pool2d(maps, self.factor).flatten(2).transpose(1, 2)
