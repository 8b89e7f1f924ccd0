"""Text to video: the sampling loop against diffusers' pipeline; quantised, compiled, and in other memory layouts.

On CUDA a network of Latte-1's size samples 16 frames of 512 x 512 in fp16, 50 steps with guidance; a decoder of Stable
Diffusion's size decodes them; a T5 of XXL's size encodes a prompt. On a CPU all three are small. Weights are random, so
nothing is downloaded. Without diffusers ours alone is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig, build_diffusion, sample
from models.autoencoder import AUTOENCODERS, CodecConfig, LatentCodec
from models.config_t2v import LATTE_1, LatteT2VConfig
from models.latte_t2v import LatteT2V
from models.quantize import QUANTIZERS, quantize

from . import report
from .timing import Call, Case, Timer, compare_one_by_one

GUIDANCE = 7.5
WORDS = 24  # of the prompt
HAS_DIFFUSERS = find_spec("diffusers") is not None
Maker = Callable[[], tuple[Call, nn.Module]]
COLUMNS = {
    "": "",
    "median s": ".2f",
    "spread": ".0%",
    "ratio": ".2f",
    "weights MiB": ".1f",
    "peak GiB": ".2f",
    "apart": ".1e",
}


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


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scale = LATTE_SCALE if device.type == "cuda" and not arguments.quick else SMALL_SCALE
    if arguments.steps:
        scale = replace(scale, steps=arguments.steps)
    if arguments.quick:
        scale = replace(scale, steps=2, network=replace(scale.network, num_layers=1))
    timer = Timer(device, arguments.rounds, arguments.clock)
    sections = [sampling(scale, timer, compiled=not arguments.quick)]
    sections += [decoding(scale, timer, compiled=not arguments.quick)] if HAS_DIFFUSERS else []
    sections.append(encoding(scale, timer))
    theirs = "" if HAS_DIFFUSERS else " diffusers is not installed here: ours alone is timed, and no decoder."
    text = (
        f"Random weights. `ratio`: how many times as fast as the first row; `apart`: from its result, relative.{theirs}"
    )
    report.write("t2v", "Text to video", text, sections, arguments.out, device)


@torch.no_grad()
def table(title: str, text: str, makers: dict[str, Maker], timer: Timer) -> report.Section:
    """Times each network in turn with the first, which alone stays in memory; the peak is that of one network."""

    def case(name: str, make: Maker) -> Case:
        call, network = make()
        return Case(name, call, cells={"weights MiB": weight_bytes(network) / 2**20})

    cases = {name: partial(case, name, make) for name, make in makers.items()}
    return report.Section(title, text, COLUMNS, compare_one_by_one(cases, COLUMNS, timer, _difference))


def _difference(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


# ---- the network --------------------------------------------------------------------------------------


def sampling(scale: Scale, timer: Timer, *, compiled: bool) -> report.Section:
    """Returns the table of the sampling loop, from noise to latents."""
    device, dtype, network = timer.device, scale.dtype, scale.network
    captions = _drawn(2, WORDS, network.caption_channels or 0).to(device, dtype)
    noise = _drawn(1, network.channels[0], scale.frames, scale.latent, scale.latent).to(device, dtype)

    def ours(kind: str | None = None, compile_it: bool = False) -> tuple[Call, nn.Module]:
        model: Any = quantize(_network(network, dtype), kind, device)
        for block in model.blocks if compile_it else ():
            block.compile()
        return (lambda: sample_ddim(model, captions, noise, scale.steps)), model

    def theirs() -> tuple[Call, nn.Module]:
        from models.convert_t2v import to_diffusers

        return _their_pipeline(
            model := to_diffusers(_network(network, dtype)).to(device), captions, noise, scale
        ), model

    makers: dict[str, Maker] = {"diffusers' pipeline": theirs} if HAS_DIFFUSERS else {}
    makers["ours"] = ours
    if compiled:
        makers["ours, compiled"] = lambda: ours(compile_it=True)
    for kind in tuple(QUANTIZERS) if device.type == "cuda" else ("int8",):
        makers[f"ours, {kind}"] = partial(ours, kind)
    text = (
        f"{scale.frames} frames, latents {scale.latent} x {scale.latent}, {scale.steps} DDIM steps with guidance "
        f"{GUIDANCE:g}, {_name(dtype)}; the same weights and noise in all rows."
    )
    return table("Sampling", text, makers, timer)


@torch.no_grad()
def sample_ddim(model: LatteT2V, captions: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Samples (1, C, F, h, w) with our DDIM and schedule, without diffusers."""
    process = build_diffusion(DiffusionConfig(), learn_sigma=True, respacing=f"ddim{steps}").to(noise.device)
    channels = noise.shape[1]

    def guided(x: Tensor, timesteps: Tensor) -> Tensor:
        both, times = x.transpose(1, 2).to(noise.dtype).expand(2, -1, -1, -1, -1), timesteps.expand(2)
        without, caption = model(both, times, captions).sample.float().chunk(2)
        mean = without[:, :channels] + GUIDANCE * (caption - without)[:, :channels]
        return torch.cat([mean, caption[:, channels:]], dim=1).transpose(1, 2)

    return sample(process, guided, noise.transpose(1, 2).float(), method="ddim").transpose(1, 2)


def _their_pipeline(network: nn.Module, captions: Tensor, noise: Tensor, scale: Scale) -> Call:
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline

    scheduler = DDIMScheduler(
        clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps_offset=0, set_alpha_to_one=True
    )
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8,) * 4, norm_num_groups=4
    )
    pipeline = LattePipeline(None, None, vae.to(noise.device, noise.dtype), network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    given = {"negative_prompt": None, "prompt_embeds": captions[1:], "negative_prompt_embeds": captions[:1]}
    sizes = {"height": 8 * scale.latent, "width": 8 * scale.latent, "video_length": scale.frames}
    return lambda: pipeline(
        **given, **sizes, latents=noise.clone(), num_inference_steps=scale.steps, guidance_scale=GUIDANCE,
        output_type="latent",
    ).frames  # fmt: skip


def _network(config: LatteT2VConfig, dtype: torch.dtype) -> LatteT2V:
    """Returns a network with the same random weights each time, none of them zero."""
    torch.manual_seed(0)
    model = LatteT2V(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval().to(dtype)


# ---- decoder and text encoder -------------------------------------------------------------------------


def decoding(scale: Scale, timer: Timer, *, compiled: bool) -> report.Section:
    """Returns the table of decoding latents to frames: by layout, compiled, and in parts."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes: Any = {"block_out_channels": scale.decoder, "layers_per_block": 2, "sample_size": 8 * scale.latent}
    vae = AutoencoderKL(down_block_types=blocks[0], up_block_types=blocks[1], **sizes).to(scale.dtype).eval()
    latents = _drawn(1, scale.frames, 4, scale.latent, scale.latent).to(timer.device)
    precision = {torch.float32: "fp32", torch.float16: "fp16"}[scale.dtype]

    def maker(
        channels_last: bool = False, compile_it: bool = False, chunk: int = scale.frames, method: str = ""
    ) -> Any:
        def make() -> tuple[Call, nn.Module]:
            network = deepcopy(vae).to(timer.device)
            if channels_last:
                network = network.to(memory_format=torch.channels_last)
            if compile_it:
                network.decoder.compile()
            if method:
                getattr(network, method)()
            config = CodecConfig(path="random", dtype=precision, chunk_size=chunk)
            codec = LatentCodec(config, AUTOENCODERS["AutoencoderKL"], network)
            return (lambda: codec.decode(latents)), network

        return make

    makers = {"plain": maker(), "channels_last": maker(True)}
    if compiled:
        makers |= {"compiled": maker(compile_it=True), "channels_last, compiled": maker(True, True)}
    makers |= {
        "channels_last, one frame at a time": maker(True, chunk=1),
        "channels_last, slicing": maker(True, method="enable_slicing"),
        "channels_last, tiling": maker(True, method="enable_tiling"),
    }
    text = (
        f"{scale.frames} frames of {8 * scale.latent} x {8 * scale.latent}, {precision}. Sampling uses channels_last."
    )
    return table("Decoding", text, makers, timer)


def encoding(scale: Scale, timer: Timer) -> report.Section:
    """Returns the table of encoding a prompt of 120 tokens."""
    from transformers import T5Config, T5EncoderModel

    config: Any = T5Config(**scale.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    words = torch.randint(3, scale.t5["vocab_size"], (1, 120), generator=torch.Generator().manual_seed(0))

    def maker(kind: str | None) -> Any:
        def make() -> tuple[Call, nn.Module]:
            with torch.device("meta"):  # skips an initialisation that would take minutes
                network = T5EncoderModel(config).eval().requires_grad_(False).to(scale.dtype)
            generator = torch.Generator().manual_seed(0)
            for parameter in network.to_empty(device="cpu").parameters():
                parameter.uniform_(-0.03, 0.03, generator=generator)
            network = quantize(network, kind, timer.device)
            return (lambda: network(words.to(timer.device))[0]), network

        return make

    kinds = tuple(QUANTIZERS) if timer.device.type == "cuda" else ("int8",)
    makers = {_name(scale.dtype): maker(None), **{kind: maker(kind) for kind in kinds}}
    return table("Encoding a prompt", "T5 with a gated MLP, 120 tokens.", makers, timer)


# ---- helpers ------------------------------------------------------------------------------------------


def weight_bytes(network: nn.Module) -> int:
    """Returns the bytes of all weights, quantised or not."""
    return sum(_bytes(parameter) for parameter in network.parameters())


def _bytes(value: Tensor) -> int:
    if hasattr(value, "__tensor_flatten__"):  # torchao's
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    state = getattr(value, "quant_state", None)  # of NF4
    return value.numel() * value.element_size() + (_bytes(state.absmax) if state is not None else 0)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
