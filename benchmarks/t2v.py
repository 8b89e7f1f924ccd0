"""Times text to video: sampling against diffusers' pipeline, decoding, encoding prompts; quantised and compiled.

On CUDA a network of Latte-1's size samples 16 frames of 512 x 512 in fp16, 50 steps with guidance; a decoder of Stable
Diffusion's size decodes them; an encoder of T5-XXL's size encodes a prompt. On a CPU all three are small.
Weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import diffusion
from models.autoencoder import AUTOENCODERS, CodecConfig, LatentCodec
from models.blocks import compile_blocks
from models.config_t2v import LATTE_1, LatteT2VConfig
from models.convert_t2v import to_diffusers
from models.latte_t2v import LatteT2V
from models.quantize import QUANTIZERS, quantize

from .report import Table
from .timing import Call, Case, Timer
from .workload import Workload

GUIDANCE = 7.5
WORDS = 24  # tokens of the prompt
VAE_BLOCKS: Any = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
Options = dict[str, Any]  # arguments of a row's case


class Scale(NamedTuple):
    """Sizes of the networks and of the video."""

    network: LatteT2VConfig
    frames: int
    latent: int
    steps: int
    precision: str
    decoder: tuple[int, ...]
    t5: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.precision == "fp16" else torch.float32


LATTE_SCALE = Scale(
    LATTE_1, 16, 64, 50, "fp16", (128, 256, 512, 512),
    {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
)  # fmt: skip
SMALL_SCALE = Scale(
    replace(LATTE_1, num_attention_heads=4, attention_head_dim=64, cross_attention_dim=256, num_layers=4,
            caption_channels=256, sample_size=16, video_length=8),
    8, 16, 4, "fp32", (32, 64, 64, 64),
    {"d_model": 256, "d_kv": 32, "d_ff": 640, "num_layers": 4, "num_heads": 8, "vocab_size": 4096},
)  # fmt: skip
SAMPLING: dict[str, Options] = {
    "diffusers' pipeline": {"theirs": True},
    "ours": {},
    "ours, compiled": {"compiled": True},
}
LAST = {"channels_last": True}
DECODING: dict[str, Options] = {
    "plain": {},
    "channels_last": LAST,
    "compiled": {"compiled": True},
    "channels_last, compiled": {**LAST, "compiled": True},
    "channels_last, one frame at a time": {**LAST, "chunk": 1},
    "channels_last, slicing": {**LAST, "method": "enable_slicing"},
    "channels_last, tiling": {**LAST, "method": "enable_tiling"},
}


def t2v(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of sampling, decoding and encoding prompts."""
    scale = LATTE_SCALE if timer.on_cuda and not arguments.quick else SMALL_SCALE
    if arguments.quick:
        scale = scale._replace(steps=2, network=replace(scale.network, num_layers=1))
    scale = scale._replace(steps=arguments.steps or scale.steps)
    kinds = {kind: {"kind": kind} for kind in (QUANTIZERS if timer.on_cuda else ("int8",))}
    size = f"{scale.frames} frames, latents {scale.latent} x {scale.latent}"
    loop = f"{size}, {scale.steps} DDIM steps with guidance {GUIDANCE:g}, {scale.precision}."
    sampling = {**SAMPLING, **{f"ours, {kind}": options for kind, options in kinds.items()}}
    heads = ("median s", "spread", "ratio", "weights MiB", "peak GB", "apart")
    for title, text, make, rows in (
        ("Sampling", loop, sampling_case, sampling),
        ("Decoding", f"{size}, {scale.precision}. Sampling uses channels_last.", decoding_case, DECODING),
        ("Encoding a prompt", "T5 with a gated MLP, 120 tokens.", encoding_case, {scale.precision: {}, **kinds}),
    ):
        chosen = {name: options for name, options in rows.items() if not (arguments.quick and "compiled" in options)}
        makers = {name: partial(make, scale, timer.device, **options) for name, options in chosen.items()}
        with torch.no_grad():
            yield Table(title, text, heads, timer.compare(makers, heads, at_once=False))


def sampling_case(
    scale: Scale, device: torch.device, *, theirs: bool = False, kind: str | None = None, compiled: bool = False
) -> Case:
    """Returns the case that samples latents from noise; all rows have the same weights and noise."""
    network = scale.network
    captions = _draw(2, WORDS, network.caption_channels or 0).to(device, scale.dtype)
    noise = _draw(1, network.channels[0], scale.frames, scale.latent, scale.latent).to(device, scale.dtype)
    torch.manual_seed(0)
    model = LatteT2V(network)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model = model.requires_grad_(False).eval().to(scale.dtype)
    if theirs:
        exported = to_diffusers(model).to(device)
        return _case(_their_pipeline(exported, captions, noise, scale), exported)
    ours: Any = quantize(model, kind, device)
    if compiled:
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


def decoding_case(
    scale: Scale,
    device: torch.device,
    *,
    channels_last: bool = False,
    compiled: bool = False,
    chunk: int | None = None,
    method: str = "",
) -> Case:
    """Returns the case that decodes latents to frames, after calling `method` of diffusers' autoencoder, if any."""
    torch.manual_seed(0)
    sizes: Any = {"block_out_channels": scale.decoder, "layers_per_block": 2, "sample_size": 8 * scale.latent}
    network = AutoencoderKL(**VAE_BLOCKS, **sizes).to(device, scale.dtype).eval()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    if compiled:
        network.decoder.compile()
    if method:
        getattr(network, method)()
    config = CodecConfig(path="random", dtype=scale.precision, chunk_size=chunk or scale.frames)
    codec = LatentCodec(config, AUTOENCODERS["AutoencoderKL"], network)
    latents = _draw(1, scale.frames, 4, scale.latent, scale.latent).to(device)
    return _case(lambda: codec.decode(latents), network)


def encoding_case(scale: Scale, device: torch.device, *, kind: str | None = None) -> Case:
    """Returns the case that encodes a prompt of 120 tokens."""
    config: Any = T5Config(**scale.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, scale.t5["vocab_size"], (1, 120), generator=generator).to(device)
    with torch.device("meta"):  # skips an initialisation that would take minutes
        network = T5EncoderModel(config).eval().requires_grad_(False).to(scale.dtype)
    for parameter in network.to_empty(device="cpu").parameters():
        parameter.uniform_(-0.03, 0.03, generator=generator)
    encoder = quantize(network, kind, device)
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
