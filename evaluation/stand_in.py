"""A stand-in for detectors that are not available: torchvision's MobileNetV2, on frames or clips.

It ranks sets of videos plausibly, but its values are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
LAST_BLOCK = 18  # layers up to the last bottleneck (320 channels); the next has 1280
KEY = "features.0.0.weight"  # identifies MobileNetV2 weights


class StandIn(nn.Module):
    """MobileNetV2 as a detector. Raises: ValueError if the weights are not MobileNetV2's.

    Args:
        kind: "frame": the 1280 pooled features of a frame; "clip": the mean over time of the 320 pooled features
            of the last bottleneck, and their mean absolute change between frames, which depends on frame order;
            "probabilities": the 1000 ImageNet classes of a frame.
        weights: torchvision's state dict; if converted from int8 (batch norms folded), the network gets plain ReLUs,
            as quantised networks have. `path` names it in errors.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], path: Path) -> None:
        from torchvision.models import mobilenet_v2

        super().__init__()
        self.kind = kind
        self.network = mobilenet_v2()
        try:
            self.network.load_state_dict({name: value.float() for name, value in weights.items()})
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the weights of torchvision's mobilenet_v2.") from error
        if not any(value.any() for name, value in weights.items() if name.endswith("running_mean")):
            for module in list(self.network.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.ReLU6):
                        setattr(module, name, nn.ReLU(inplace=True))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Maps uint8 frames (B, 3, H, W) or clips (B, 3, T, H, W) to (B, D)."""
        if self.kind == "clip":
            return torch.stack([self._clip(clip.transpose(0, 1)) for clip in pixels])
        frames = self._normalized(pixels)
        if self.kind == "probabilities":
            return self.network(frames).softmax(1)
        return self.network.features(frames).mean((2, 3))

    def _clip(self, frames: Tensor) -> Tensor:
        """Maps one clip (T, 3, H, W) to (640,)."""
        features = self.network.features[:LAST_BLOCK](self._normalized(frames)).mean((2, 3))
        return torch.cat([features.mean(0), features.diff(dim=0).abs().mean(0)])

    def _normalized(self, frames: Tensor) -> Tensor:
        """Resizes uint8 (T, 3, H, W) to (T, 3, 224, 224), ignoring aspect ratio, and normalises it."""
        resized = F.interpolate(frames.float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)
        mean, std = (resized.new_tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        return (resized - mean) / std
