"""Text to video: the sampling loop against diffusers' pipeline; quantised, compiled, and in other memory layouts.

On CUDA a network of Latte-1's size samples 16 frames of 512 x 512 in fp16, 50 steps with guidance; a decoder of Stable
Diffusion's size decodes them; a T5 of XXL's size encodes a prompt. On a CPU all three are small. Weights are random, so
nothing is downloaded. Without diffusers ours alone is timed, and no decoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffusion
from models.autoencoder import AUTOENCODERS, CodecConfig, LatentCodec
from models.blocks import compile_blocks
from models.config_t2v import LATTE_1, LatteT2VConfig
from models.latte_t2v import LatteT2V
from models.quantize import QUANTIZERS, quantize

from .report import Table
from .timing import Call, Case, Timer
from .workload import Workload

GUIDANCE = 7.5
WORDS = 24  # of the prompt
VAE_BLOCKS: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


@dataclass(frozen=True)
class Scale:
    """Sizes of the networks and of the video."""

    network: LatteT2VConfig
    frames: int
    latent: int
    steps: int
    dtype: torch.dtype
    decoder: tuple[int, ...]
    t5: dict[str, int]


LATTE_SCALE = Scale(
    LATTE_1, 16, 64, 50, torch.float16, (128, 256, 512, 512),
    {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
)  # fmt: skip
SMALL_SCALE = Scale(
    replace(LATTE_1, num_attention_heads=4, attention_head_dim=64, cross_attention_dim=256, num_layers=4,
            caption_channels=256, sample_size=16, video_length=8),
    8, 16, 4, torch.float32, (32, 64, 64, 64),
    {"d_model": 256, "d_kv": 32, "d_ff": 640, "num_layers": 4, "num_heads": 8, "vocab_size": 4096},
)  # fmt: skip


class Way(NamedTuple):
    """One row: diffusers' pipeline or ours, how the weights are quantised and laid out, how many frames at a time."""

    theirs: bool = False
    kind: str | None = None
    compiled: bool = False
    channels_last: bool = False
    chunk: int | None = None
    method: str = ""  # of diffusers' decoder


SAMPLING = {"diffusers' pipeline": Way(theirs=True), "ours": Way(), "ours, compiled": Way(compiled=True)}
DECODING = {
    "plain": Way(),
    "channels_last": Way(channels_last=True),
    "compiled": Way(compiled=True),
    "channels_last, compiled": Way(channels_last=True, compiled=True),
    "channels_last, one frame at a time": Way(channels_last=True, chunk=1),
    "channels_last, slicing": Way(channels_last=True, method="enable_slicing"),
    "channels_last, tiling": Way(channels_last=True, method="enable_tiling"),
}


def t2v(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of sampling, decoding and encoding prompts."""
    scale = LATTE_SCALE if timer.on_cuda and not arguments.quick else SMALL_SCALE
    if arguments.quick:
        scale = replace(scale, steps=2, network=replace(scale.network, num_layers=1))
    scale = replace(scale, steps=arguments.steps or scale.steps)
    kinds = tuple(QUANTIZERS) if timer.on_cuda else ("int8",)
    has_diffusers = find_spec("diffusers") is not None
    precision = str(scale.dtype).removeprefix("torch.")
    size = f"{scale.frames} frames, latents {scale.latent} x {scale.latent}"
    tables: list[tuple[str, str, Callable[[Scale, torch.device, Way], Case], dict[str, Way]]] = [
        ("Sampling", f"{size}, {scale.steps} DDIM steps with guidance {GUIDANCE:g}, {precision}.", sampling_case,
         {**SAMPLING, **{f"ours, {kind}": Way(kind=kind) for kind in kinds}}),
        ("Decoding", f"{size}, {precision}. Sampling uses channels_last.", decoding_case, DECODING),
        ("Encoding a prompt", "T5 with a gated MLP, 120 tokens.", encoding_case,
         {precision: Way(), **{kind: Way(kind=kind) for kind in kinds}}),
    ]  # fmt: skip
    heads = ("median s", "spread", "ratio", "weights MiB", "peak GB", "apart")
    for title, text, make, ways in tables if has_diffusers else (tables[0], tables[2]):
        makers = {
            name: partial(make, scale, timer.device, way)
            for name, way in ways.items()
            if (has_diffusers or not way.theirs) and not (way.compiled and arguments.quick)
        }
        with torch.no_grad():
            yield Table(title, text, heads, timer.compare(makers, heads, at_once=False))


def sampling_case(scale: Scale, device: torch.device, way: Way) -> Case:
    """Returns the sampling loop, from noise to latents; the same weights and noise for all."""
    network = scale.network
    captions = _draw(2, WORDS, network.caption_channels or 0).to(device, scale.dtype)
    noise = _draw(1, network.channels[0], scale.frames, scale.latent, scale.latent).to(device, scale.dtype)
    torch.manual_seed(0)
    model = LatteT2V(network)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model = model.requires_grad_(False).eval().to(scale.dtype)
    if way.theirs:
        from models.convert_t2v import to_diffusers  # needs diffusers

        theirs = to_diffusers(model).to(device)
        return _case(_their_pipeline(theirs, captions, noise, scale), theirs)
    ours: Any = quantize(model, way.kind, device)
    if way.compiled:
        compile_blocks(ours.blocks)
    return _case(lambda: sample_ddim(ours, captions, noise, scale.steps), ours)


def sample_ddim(model: LatteT2V, captions: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Samples (1, C, F, h, w) with our DDIM and schedule, without diffusers."""
    config = diffusion.DiffusionConfig()
    process = diffusion.build_diffusion(config, learn_sigma=True, respacing=f"ddim{steps}").to(noise.device)
    channels = noise.shape[1]

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        both, times = x.transpose(1, 2).to(noise.dtype).expand(2, -1, -1, -1, -1), timesteps.expand(2)
        without, caption = model(both, times, captions).sample.float().chunk(2)
        mean = without[:, :channels] + GUIDANCE * (caption - without)[:, :channels]
        return torch.cat([mean, caption[:, channels:]], dim=1).transpose(1, 2)

    return diffusion.sample(process, guided, noise.transpose(1, 2).float(), method="ddim").transpose(1, 2)


def _their_pipeline(network: nn.Module, captions: Tensor, noise: Tensor, scale: Scale) -> Call:
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline

    scheduler = DDIMScheduler(
        clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0, set_alpha_to_one=True
    )
    vae = AutoencoderKL(**VAE_BLOCKS, block_out_channels=(8,) * 4, norm_num_groups=4).to(noise.device, noise.dtype)
    pipeline = LattePipeline(None, None, vae, network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    given = {"negative_prompt": None, "prompt_embeds": captions[1:], "negative_prompt_embeds": captions[:1]}
    sizes = {"height": 8 * scale.latent, "width": 8 * scale.latent, "video_length": scale.frames}
    steps = {"num_inference_steps": scale.steps, "guidance_scale": GUIDANCE, "output_type": "latent"}
    return lambda: pipeline(**given, **sizes, **steps, latents=noise.clone()).frames


def decoding_case(scale: Scale, device: torch.device, way: Way) -> Case:
    """Returns the decoding of latents to frames."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes: Any = {"block_out_channels": scale.decoder, "layers_per_block": 2, "sample_size": 8 * scale.latent}
    network = AutoencoderKL(**VAE_BLOCKS, **sizes).to(device, scale.dtype).eval()
    if way.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if way.compiled:
        network.decoder.compile()
    if way.method:
        getattr(network, way.method)()
    precision = {torch.float32: "fp32", torch.float16: "fp16"}[scale.dtype]
    config = CodecConfig(path="random", dtype=precision, chunk_size=way.chunk or scale.frames)
    codec = LatentCodec(config, AUTOENCODERS["AutoencoderKL"], network)
    latents = _draw(1, scale.frames, 4, scale.latent, scale.latent).to(device)
    return _case(lambda: codec.decode(latents), network)


def encoding_case(scale: Scale, device: torch.device, way: Way) -> Case:
    """Returns the encoding of a prompt of 120 tokens."""
    from transformers import T5Config, T5EncoderModel

    config: Any = T5Config(**scale.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, scale.t5["vocab_size"], (1, 120), generator=generator).to(device)
    with torch.device("meta"):  # skips an initialisation that would take minutes
        network = T5EncoderModel(config).eval().requires_grad_(False).to(scale.dtype)
    for parameter in network.to_empty(device="cpu").parameters():
        parameter.uniform_(-0.03, 0.03, generator=generator)
    encoder = quantize(network, way.kind, device)
    return _case(lambda: encoder(words)[0], encoder)


def _case(call: Call, network: nn.Module) -> Case:
    return Case(call, cells={"weights MiB": sum(map(count_bytes, network.parameters())) / 2**20})


def count_bytes(value: Tensor) -> int:
    """Returns the bytes of a weight, quantised or not."""
    if hasattr(value, "__tensor_flatten__"):  # torchao's
        return sum(count_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    state = getattr(value, "quant_state", None)  # of NF4
    return value.numel() * value.element_size() + (count_bytes(state.absmax) if state is not None else 0)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
