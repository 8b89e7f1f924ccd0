"""TAEF2, a tiny autoencoder distilled from FLUX.2's (madebyollin/taesd, MIT): 32 latent channels.

Layer indices match its files, `taef2_encoder.pth` and `taef2_decoder.pth`, so the weights load strictly. The layers
are TAESD's, but blocks at the coarsest resolution have an extra `pool` branch.

Letters: B images, C latent channels, H W pixels, h w latent pixels (H / 8, W / 8).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .convert import load_pickled

ENCODER_FILE, DECODER_FILE = "taef2_encoder.pth", "taef2_decoder.pth"
WIDTH = 64
LATENT_CHANNELS = 32


def _conv(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, stride=stride, bias=bias)


class Block(nn.Module):
    """relu(x + conv(x)), conv: three 3x3 convolutions; if `pooled`, first x + pool(x)."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, kernel_size=1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, kernel_size=1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class SoftClamp(nn.Module):
    """3 tanh(z / 3): keeps outliers in the range that the decoder was trained on."""

    def forward(self, z: Tensor) -> Tensor:
        return 3.0 * torch.tanh(z / 3.0)


class Taef2(nn.Module):
    """TAEF2 for RGB in [-1, 1], like all codecs here; TAEF2 itself uses [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(3, WIDTH), Block()]
        for pooled in (False, False, True):
            layers += [_conv(WIDTH, WIDTH, stride=2, bias=False), *(Block(pooled=pooled) for _ in range(3))]
        self.encoder = nn.Sequential(*layers, _conv(WIDTH, LATENT_CHANNELS))  # (B, 3, H, W) in [0, 1] -> (B, C, h, w)
        layers = [SoftClamp(), _conv(LATENT_CHANNELS, WIDTH), nn.ReLU()]
        for pooled in (True, False, False):
            layers += [*(Block(pooled=pooled) for _ in range(3)), nn.Upsample(scale_factor=2)]
            layers += [_conv(WIDTH, WIDTH, bias=False)]
        self.decoder = nn.Sequential(*layers, Block(), _conv(WIDTH, 3))

    @classmethod
    def from_folder(cls, folder: Path) -> Taef2:
        """Loads both files in `folder` strictly. Raises: ValueError naming a file without these weights."""
        net = cls()
        for part, name in ((net.encoder, ENCODER_FILE), (net.decoder, DECODER_FILE)):
            try:
                part.load_state_dict(load_pickled(folder / name))
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / name} does not hold TAEF2 weights") from error
        return net

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder((images + 1.0) / 2.0)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 2.0 - 1.0
