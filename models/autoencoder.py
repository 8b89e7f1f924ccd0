"""LatentCodec: video to latents and back through a frozen autoencoder, or in pixel space.

The `codec` section names the autoencoder and sets scale, shift, latent channels and downsampling. These are never
read from the weights; the last two are checked when the autoencoder is loaded.

Letters: B batch, F frames, C channels of the latents, H W pixels, h w latent pixels; N frames of all clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from common.checks import FINITE, POSITIVE, check_limits, from_to, one_of, require

from .hub import find_folder, read_json
from .taef2 import DECODER_FILE, ENCODER_FILE, Taef2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG_FILE = "config.json"
WEIGHTS = "diffusion_pytorch_model"  # file name in diffusers, without suffix
LIMITS = {
    "latent_channels downsample_factor chunk_size": from_to(1, 2**16),
    "scale": POSITIVE,
    "shift": FINITE,
    "dtype": one_of(DTYPES),
}
PROBE_SIZE = 64  # height and width of the empty frame that is encoded to check channels and downsampling


@dataclass(frozen=True)
class CodecConfig:
    """The `codec` section: the autoencoder, and the scaling of its latents.

    path: a folder in the diffusers format (its `config.json` names the class: AutoencoderKL, AutoencoderTiny,
        AutoencoderDC or AutoencoderKLTemporalDecoder) or its hub name, a folder with `taef2_encoder.pth` and
        `taef2_decoder.pth`, or null for pixel space (`latent_channels: 3`, `downsample_factor: 1`).
    scale, shift: latents = (z - shift) * scale.
    chunk_size: frames per call of encoder and decoder.
    """

    path: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    latent_channels: int = 4
    downsample_factor: int = 8
    scale: float = 0.18215
    shift: float = 0.0
    dtype: str = "fp32"
    chunk_size: int = 16

    def __post_init__(self) -> None:
        check_limits(self, "codec.", LIMITS)
        read = self.path is not None or not (self.subfolder or self.revision)
        require(read, "codec.subfolder and codec.revision are read only with codec.path: set that too")


class Kind(NamedTuple):
    """How to call one class of autoencoder. Images are (N, 3, H, W) in [-1, 1], latents (N, C, h, w)."""

    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]  # -> mean and, if stochastic, std
    decode: Callable[[Any, Tensor, int], Tensor]  # (network, latents, frames per clip) -> images
    stochastic: bool = False
    temporal: bool = False  # the decoder mixes frames, so clips are never split


def _encode_gaussian(network: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    posterior = network.encode(images).latent_dist
    return posterior.mean, posterior.std


def _decode_frames(network: Any, latents: Tensor, *_: int) -> Tensor:
    return network.decode(latents).sample


# Keys are the `_class_name` in diffusers' config.json, then two of our own.
AUTOENCODERS: dict[str, Kind] = {
    "AutoencoderKL": Kind(_encode_gaussian, _decode_frames, stochastic=True),
    "AutoencoderKLTemporalDecoder": Kind(
        _encode_gaussian, lambda network, z, frames: network.decode(z, num_frames=frames).sample, True, temporal=True
    ),
    "AutoencoderTiny": Kind(lambda network, x: (network.encode(x).latents, None), _decode_frames),
    "AutoencoderDC": Kind(lambda network, x: (network.encode(x).latent, None), _decode_frames),
    "Taef2": Kind(lambda network, x: (network.encode(x), None), lambda network, z, _: network.decode(z)),
    "pixels": Kind(lambda network, x: (x, None), lambda network, z, _: z),
}


def codec_folder(config: CodecConfig) -> Path:
    """Returns the autoencoder's folder, downloaded if `config.path` is a hub name. Raises: FileNotFoundError."""
    inside = f"{config.subfolder}/" if config.subfolder else ""
    for suffix in ("safetensors", "bin"):  # so that only one is downloaded
        names = (CONFIG_FILE, f"{WEIGHTS}*.{suffix}", f"{WEIGHTS}*.json", ENCODER_FILE, DECODER_FILE)
        found = find_folder(str(config.path), config.revision, "codec.path", [f"{inside}{name}" for name in names])
        folder = found / inside
        if any(folder.glob(f"{WEIGHTS}*.{suffix}")) or (folder / DECODER_FILE).is_file():
            break
    return folder


def _load(config: CodecConfig) -> tuple[Kind, nn.Module]:
    """Returns the kind of autoencoder that `config.path` names and its network. Raises: OSError, ValueError."""
    if config.path is None:
        return AUTOENCODERS["pixels"], nn.Identity()
    folder, source, dtype = codec_folder(config), f"codec.path={config.path}", DTYPES[config.dtype]
    if (folder / ENCODER_FILE).is_file() and (folder / DECODER_FILE).is_file():
        return AUTOENCODERS["Taef2"], Taef2.from_folder(folder).to(dtype)
    if not (folder / CONFIG_FILE).is_file():
        name = "/".join(filter(None, (config.subfolder, CONFIG_FILE)))
        raise FileNotFoundError(f"{source} holds neither {name} nor {ENCODER_FILE} and {DECODER_FILE}")
    try:
        kind = str(read_json(folder / CONFIG_FILE).get("_class_name"))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    known = [each for each in AUTOENCODERS if each.startswith("Autoencoder")]
    require(kind in known, f"{source} holds a {kind}, but a codec must be one of {', '.join(known)}")
    import diffusers  # slow to import

    try:
        load = getattr(diffusers, kind).from_pretrained
        network, report = load(str(folder), torch_dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} could not be loaded as {kind}: {reason}") from error
    bad = [key for found in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in report[found]]
    wrong = f"{len(bad)} tensors are missing, unexpected or of another shape than in {kind}"
    require(not bad, f"{source}: {wrong}, the first is {''.join(bad[:1])}")
    return AUTOENCODERS[kind], network


class Posterior(NamedTuple):
    """Output of an encoder, unscaled: mean and, if stochastic, standard deviation, each (B, F, C, h, w)."""

    mean: Tensor
    std: Tensor | None

    def latents(self, config: CodecConfig, noise: Tensor | None = None) -> Tensor:
        """Returns the mean, or a sample if unit `noise` is given, shifted and scaled by `config`, in fp32."""
        z = self.mean.float()
        if noise is not None and self.std is not None:
            z = z + self.std.float() * noise.float()
        return (z - config.shift) * config.scale


@dataclass(frozen=True)
class StoredCodec:
    """Replaces the codec for cached latents: knows how to sample and scale them, and has no network."""

    config: CodecConfig
    stochastic: bool


class LatentCodec(nn.Module):
    """A frozen autoencoder for clips, always in evaluation mode and without gradients.

    Attributes:
        config: its `CodecConfig`.
        stochastic: whether the encoder gives a distribution, so that `encode` can sample from it.
    """

    def __init__(self, config: CodecConfig, kind: Kind, network: nn.Module) -> None:
        super().__init__()
        self.config, self.kind, self.stochastic = config, kind, kind.stochastic
        self.network = network.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: CodecConfig, device: str | torch.device = "cpu") -> LatentCodec:
        """Loads the autoencoder that `config` names onto `device`.

        Raises: FileNotFoundError for a missing folder or hub name; ValueError for weights that cannot be loaded, or
            that contradict `codec.latent_channels` or `codec.downsample_factor`.
        """
        kind, network = _load(config)
        for module in network.to(device=device).modules():
            if isinstance(module, nn.Conv2d):  # halves the time on a CPU, and is faster on tensor cores
                cast(Any, module).to(memory_format=torch.channels_last)
        codec = cls(config, kind, network)
        empty = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device, dtype=DTYPES[config.dtype])
        with torch.no_grad():
            mean, _ = kind.encode(network, empty)
        source = "pixel space" if config.path is None else config.path
        for key, found in (("latent_channels", mean.shape[1]), ("downsample_factor", PROBE_SIZE // mean.shape[2])):
            given = getattr(config, key)
            require(given == found, f"codec.{key} is {given}, but that of {source} is {found}; set codec.{key}={found}")
        return codec

    def train(self, mode: bool = True) -> LatentCodec:
        """Stays in evaluation mode, even inside a module set to train."""
        return super().train(False)

    def latent_shape(self, video_shape: Iterable[int]) -> torch.Size:
        """Returns the shape of the latents of a video: (B, F, 3, H, W) -> (B, F, C, h, w).

        Raises: ValueError for another shape, or if H or W is not a multiple of `codec.downsample_factor`.
        """
        shape, factor = tuple(video_shape), self.config.downsample_factor
        require(len(shape) == 5 and shape[2] == 3, f"a video must be (batch, frames, 3, height, width), got {shape}")
        batch, frames, _, height, width = shape
        wrong = f"a video of {height}x{width} pixels is not divisible by codec.downsample_factor={factor}"
        require(height % factor == width % factor == 0, wrong)
        return torch.Size((batch, frames, self.config.latent_channels, height // factor, width // factor))

    @torch.no_grad()
    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encodes (B, F, 3, H, W) in [-1, 1] to latents (B, F, C, h, w), fp32.

        `noise`: None for the mean of the encoder's distribution, or unit noise of the latents' shape for a sample.

        Raises: ValueError for another shape, or for `noise` if the encoder is not `stochastic`.
        """
        if noise is not None:
            require(self.stochastic, "this codec is not stochastic: encode takes no noise")
            shape = self.latent_shape(video.shape)
            require(noise.shape == shape, f"noise has shape {tuple(noise.shape)}, but the latents have {tuple(shape)}")
        return self.posterior(video).latents(self.config, noise)

    @torch.no_grad()
    def posterior(self, video: Tensor) -> Posterior:
        """Encodes (B, F, 3, H, W) in [-1, 1] to unscaled mean and standard deviation, fp32."""
        shape = self.latent_shape(video.shape)
        images = rearrange(video, "b f c h w -> (b f) c h w").to(DTYPES[self.config.dtype])
        parts = [self.kind.encode(self.network, chunk) for chunk in images.split(self.config.chunk_size)]
        mean = torch.cat([mean.float() for mean, _ in parts]).view(shape)
        stds = [std.float() for _, std in parts if std is not None]
        return Posterior(mean, torch.cat(stds).view(shape) if stds else None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, F, C, h, w) to (B, F, 3, H, W) in [-1, 1], fp32, clamped.

        A decoder that mixes frames gets complete clips, regardless of `codec.chunk_size`.
        """
        batch, frames = latents.shape[:2]
        raw = latents.float() / self.config.scale + self.config.shift
        z = rearrange(raw, "b f c h w -> (b f) c h w").to(DTYPES[self.config.dtype])
        size = self.config.chunk_size
        if self.kind.temporal:
            size = max(1, size // frames) * frames
        images = torch.cat([self.kind.decode(self.network, chunk, frames).float() for chunk in z.split(size)])
        return rearrange(images, "(b f) c h w -> b f c h w", b=batch).clamp(-1.0, 1.0)
