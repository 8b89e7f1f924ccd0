"""LatentCodec: video to latents and back by a frozen autoencoder of one of several classes, or in pixel space.

The `codec` section names the autoencoder and states scale, shift, latent channels and downsampling. They are never
taken from the weights; the last two are checked when the autoencoder is loaded.

Letters: B batch, F frames, C channels of the latents, H W pixels, h w latent pixels; N frames of all clips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from .hub import expand_home, find_folder, is_hub_name, refuse_revision
from .taef2 import DECODER_FILE, ENCODER_FILE, Taef2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG_FILE = "config.json"
WEIGHTS = "diffusion_pytorch_model"  # file name in diffusers, without suffix
MOST = 2**16  # upper limit of channels, downsampling and chunk size
PROBE_SIZE = 64  # height and width of the empty frame that is encoded to check channels and downsampling


@dataclass(frozen=True)
class CodecConfig:
    """The `codec` section: the autoencoder, and the scaling of its latents.

    path: a folder in the diffusers format (its `config.json` names the class: AutoencoderKL, AutoencoderTiny
        or AutoencoderKLTemporalDecoder), the hub name of one, a folder with `taef2_encoder.pth` and
        `taef2_decoder.pth`, or null for pixel space (`latent_channels: 3`, `downsample_factor: 1`).
    scale, shift: latents = (z - shift) * scale.
    chunk_size: frames per call of encoder and decoder.

    Raises: ValueError for a value out of range; the message names its key.
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
        for key in ("latent_channels", "downsample_factor", "chunk_size"):
            if not 1 <= getattr(self, key) <= MOST:
                raise ValueError(f"codec.{key} must be from 1 to {MOST:,}, got {getattr(self, key)}")
        if not 0.0 < self.scale < math.inf:
            raise ValueError(f"codec.scale must be positive and finite, got {self.scale}")
        if not math.isfinite(self.shift):
            raise ValueError(f"codec.shift must be finite, got {self.shift}")
        if self.path is None and (self.subfolder or self.revision):
            raise ValueError("codec.subfolder and codec.revision are read only with codec.path: set that too")
        if self.dtype not in DTYPES:
            raise ValueError(f"codec.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


# ------------------------------------------------------------------------------------------- kinds


class Kind(NamedTuple):
    """Calls of one class of autoencoder. Images are (N, 3, H, W) in [-1, 1], latents (N, C, h, w)."""

    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]  # -> mean and, if stochastic, std
    decode: Callable[[Any, Tensor, int], Tensor]  # (network, latents, frames per clip) -> images
    stochastic: bool = False
    temporal: bool = False  # the decoder mixes frames, so clips are never split


def _encode_gaussian(network: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    posterior = network.encode(images).latent_dist
    return posterior.mean, posterior.std


def _decode_frames(network: Any, latents: Tensor, num_frames: int) -> Tensor:
    return network.decode(latents).sample


def _decode_clips(network: Any, latents: Tensor, num_frames: int) -> Tensor:
    return network.decode(latents, num_frames=num_frames).sample


# Keys are the `_class_name` in diffusers' config.json, then two of our own.
AUTOENCODERS: dict[str, Kind] = {
    "AutoencoderKL": Kind(_encode_gaussian, _decode_frames, stochastic=True),
    "AutoencoderKLTemporalDecoder": Kind(_encode_gaussian, _decode_clips, stochastic=True, temporal=True),
    "AutoencoderTiny": Kind(lambda network, x: (network.encode(x).latents, None), _decode_frames),
    "Taef2": Kind(lambda network, x: (network.encode(x), None), lambda network, z, _: network.decode(z)),
    "pixels": Kind(lambda network, x: (x, None), lambda network, z, _: z),
}


# ----------------------------------------------------------------------------------------- loading


def local_folder(config: CodecConfig) -> Path | None:
    """Returns the folder that `config.path` names, or None for a hub name.

    Raises: FileNotFoundError if it is neither.
    """
    folder = expand_home(str(config.path))
    if folder.is_dir():
        return folder
    if folder.exists() or not is_hub_name(str(config.path)):
        raise FileNotFoundError(
            f"codec.path={config.path} is not a folder; give one in the diffusers format, or owner/name on the hub"
        )
    return None


def codec_folder(config: CodecConfig) -> Path:
    """Returns the folder of the autoencoder: in the folder that `config.path` names, or downloaded from the hub.

    Raises: FileNotFoundError if there is none.
    """
    folder, inside = local_folder(config), f"{config.subfolder}/" if config.subfolder else ""
    if folder is not None:
        refuse_revision(str(config.path), config.revision, "codec.path")
    for suffix in ("safetensors", "bin") if folder is None else ():
        names = (CONFIG_FILE, f"{WEIGHTS}*.{suffix}", f"{WEIGHTS}*.json", ENCODER_FILE, DECODER_FILE)
        found = find_folder(str(config.path), config.revision, "codec.path", [f"{inside}{name}" for name in names])
        folder = found / inside
        if any(folder.glob(f"{WEIGHTS}*.{suffix}")) or (folder / DECODER_FILE).is_file():
            return folder
    return cast(Path, folder) / inside


def _class_name(config: CodecConfig, file: Path) -> str:
    """Returns the `_class_name` in a `config.json`.

    Raises: ValueError if it is not one of `AUTOENCODERS`.
    """
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"codec.path={config.path}: {file.name} does not describe an autoencoder") from error
    known = [kind for kind in AUTOENCODERS if kind.startswith("Autoencoder")]
    if name not in known:
        raise ValueError(f"codec.path={config.path} holds a {name}, but a codec must be one of {', '.join(known)}")
    return str(name)


def _load_diffusers(config: CodecConfig, folder: Path, class_name: str) -> nn.Module:
    """Loads an autoencoder by `from_pretrained`.

    Raises: ValueError unless the weights fit exactly.
    """
    import diffusers  # slow to import

    try:
        network, report = getattr(diffusers, class_name).from_pretrained(
            str(folder),
            torch_dtype=DTYPES[config.dtype],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"codec.path={config.path} could not be loaded as {class_name}: {reason}") from error
    bad = [key for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in report[kind]]
    if bad:
        raise ValueError(
            f"codec.path={config.path}: {len(bad)} tensors are missing, unexpected or of another shape than in "
            f"{class_name}, the first is {bad[0]}"
        )
    return cast(nn.Module, network)


def _load(config: CodecConfig) -> tuple[Kind, nn.Module]:
    """Loads the network that `config.path` names, on the CPU; returns its kind and the network."""
    if config.path is None:
        return AUTOENCODERS["pixels"], nn.Identity()
    folder = codec_folder(config)
    if (folder / ENCODER_FILE).is_file() and (folder / DECODER_FILE).is_file():
        return AUTOENCODERS["Taef2"], Taef2.from_folder(folder).to(DTYPES[config.dtype])
    if not (folder / CONFIG_FILE).is_file():
        name = "/".join(filter(None, (config.subfolder, CONFIG_FILE)))
        raise FileNotFoundError(f"codec.path={config.path} holds neither {name} nor {ENCODER_FILE} and {DECODER_FILE}")
    class_name = _class_name(config, folder / CONFIG_FILE)
    return AUTOENCODERS[class_name], _load_diffusers(config, folder, class_name)


# ------------------------------------------------------------------------------------------- codec


class Posterior(NamedTuple):
    """Output of an encoder, unscaled: mean and, if stochastic, standard deviation, each (B, F, C, h, w)."""

    mean: Tensor
    std: Tensor | None

    def latents(self, config: CodecConfig, noise: Tensor | None = None) -> Tensor:
        """Returns the mean, or with unit `noise` of its shape a sample, shifted and scaled as in `config`, in fp32."""
        z = self.mean.float()
        if noise is not None and self.std is not None:
            z = z + self.std.float() * noise.float()
        return (z - config.shift) * config.scale


@dataclass(frozen=True)
class StoredCodec:
    """Stands for the codec of cached latents: how they are sampled and scaled, without a network."""

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
        self.config = config
        self.kind = kind
        self.stochastic = kind.stochastic
        self.network = network.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: CodecConfig, device: str | torch.device = "cpu") -> LatentCodec:
        """Loads the autoencoder that `config` names onto `device`.

        Raises: FileNotFoundError for a folder or hub name that does not exist; ValueError for weights that do not fit,
            or if `codec.latent_channels` or `codec.downsample_factor` differ from those of the autoencoder.
        """
        kind, network = _load(config)
        for module in network.to(device=device).modules():
            if isinstance(module, nn.Conv2d):  # halves the time on a CPU, and is faster on tensor cores
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        codec = cls(config, kind, network)
        codec._check_against_config(torch.device(device))
        return codec

    def train(self, mode: bool = True) -> LatentCodec:
        """Keeps evaluation mode, also inside a module that is set to train."""
        return super().train(False)

    def latent_shape(self, video_shape: Iterable[int]) -> torch.Size:
        """Returns the shape of the latents of a video: (B, F, 3, H, W) -> (B, F, C, h, w).

        Raises: ValueError for another shape, or if H or W is not a multiple of `codec.downsample_factor`.
        """
        shape, factor = tuple(video_shape), self.config.downsample_factor
        if len(shape) != 5 or shape[2] != 3:
            raise ValueError(f"a video must be (batch, frames, 3, height, width), got {shape}")
        batch, frames, _, height, width = shape
        if height % factor or width % factor:
            raise ValueError(f"a video of {height}x{width} pixels is not divisible by codec.downsample_factor={factor}")
        return torch.Size((batch, frames, self.config.latent_channels, height // factor, width // factor))

    @torch.no_grad()
    def encode(self, video: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> latents (B, F, C, h, w), fp32.

        noise: None for the mean of the encoder's distribution, or unit noise of the latents' shape for a sample.

        Raises: ValueError for another shape, or for `noise` if the encoder is not `stochastic`.
        """
        shape = self.latent_shape(video.shape)
        if noise is not None and not self.stochastic:
            raise ValueError("this codec is not stochastic: encode takes no noise")
        if noise is not None and noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but the latents have {shape}")
        return self.posterior(video).latents(self.config, noise)

    @torch.no_grad()
    def posterior(self, video: Tensor) -> Posterior:
        """(B, F, 3, H, W) in [-1, 1] -> unscaled mean and standard deviation, fp32."""
        shape = self.latent_shape(video.shape)
        images = rearrange(video, "b f c h w -> (b f) c h w").to(DTYPES[self.config.dtype])
        parts = [self.kind.encode(self.network, chunk) for chunk in images.split(self.config.chunk_size)]
        mean = torch.cat([mean.float() for mean, _ in parts]).view(shape)
        stds = [std.float() for _, std in parts if std is not None]
        return Posterior(mean, torch.cat(stds).view(shape) if stds else None)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) -> (B, F, 3, H, W) in [-1, 1], fp32, clamped.

        A decoder that mixes frames gets complete clips, even if `codec.chunk_size` is smaller, so that the result does
        not depend on it.
        """
        batch, frames = latents.shape[:2]
        raw = latents.float() / self.config.scale + self.config.shift
        z = rearrange(raw, "b f c h w -> (b f) c h w").to(DTYPES[self.config.dtype])
        size = self.config.chunk_size
        if self.kind.temporal:
            size = max(1, size // frames) * frames
        images = torch.cat([self.kind.decode(self.network, chunk, frames).float() for chunk in z.split(size)])
        return rearrange(images, "(b f) c h w -> b f c h w", b=batch).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _check_against_config(self, device: torch.device) -> None:
        """Encodes an empty frame to check channels and downsampling.

        Raises: ValueError if `codec.latent_channels` or `codec.downsample_factor` are not those of the network.
        """
        empty = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device, dtype=DTYPES[self.config.dtype])
        mean, _ = self.kind.encode(self.network, empty)
        found = {"latent_channels": mean.shape[1], "downsample_factor": PROBE_SIZE // mean.shape[2]}
        where = "pixel space" if self.config.path is None else self.config.path
        for key, value in found.items():
            given = getattr(self.config, key)
            if given != value:
                raise ValueError(f"codec.{key} is {given}, but that of {where} is {value}; set codec.{key}={value}")
