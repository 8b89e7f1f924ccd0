"""Text to video: the sampling loop against diffusers' pipeline, and what quantising, compiling and layouts change.

On CUDA a network of Latte-1's size samples 16 frames of 512 x 512 in fp16, 50 steps with guidance; a decoder of Stable
Diffusion's size decodes them; a T5 of XXL's size encodes a prompt. On a CPU all three are small. Weights are random, so
nothing is downloaded. Without diffusers ours alone is timed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import DiffusionConfig, build_diffusion, sample
from models.autoencoder import AUTOENCODERS, CodecConfig, LatentCodec
from models.config_t2v import LATTE_1, LatteT2VConfig
from models.latte_t2v import LatteT2V
from models.quantize import QUANTIZERS, quantize

from . import report
from .timing import Call, interleaved

GUIDANCE = 7.5
WORDS = 24  # of the prompt
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
    """Sizes of everything that is run."""

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
    """Measure, print, write."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scale = LATTE_SCALE if device.type == "cuda" and not arguments.quick else SMALL_SCALE
    if arguments.steps:
        scale = replace(scale, steps=arguments.steps)
    if arguments.quick:
        scale = replace(scale, steps=2, network=replace(scale.network, num_layers=1))
    measure = Measure(device, arguments.rounds, arguments.clock)
    sections = [sampling(scale, measure, compiled=not arguments.quick)]
    sections += [decoding(scale, measure, compiled=not arguments.quick)] if _diffusers() else []
    sections.append(encoding(scale, measure))
    theirs = "" if _diffusers() else " diffusers is not installed here: ours alone is timed, and no decoder."
    text = (
        f"Random weights. `ratio`: how many times as fast as the first row; `apart`: from its result, relative.{theirs}"
    )
    report.write("t2v", "Text to video", text, sections, arguments.out, device.type)


@dataclass
class Measure:
    """How rows are timed: each in turn with the first of its table, which stays while others come and go."""

    device: torch.device
    rounds: int
    clock: str

    @torch.no_grad()
    def table(self, title: str, text: str, makers: dict[str, Callable[[], tuple[Call, nn.Module]]]) -> report.Section:
        """A line for each; the peak is that of one network, without what the first holds."""
        rows: list[dict[str, Any]] = []
        kept: dict[str, Call] = {}
        expected: Tensor | None = None
        for name, make in makers.items():
            held = self._allocated("memory_allocated") if kept else 0
            call, network = make()
            result = call().float().cpu()  # compiles, too
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                call()
            peak = self._allocated("max_memory_allocated")
            kept, expected = kept or {name: call}, result if expected is None else expected
            calls = {**kept, name: call}
            found = interleaved(calls, rounds=self.rounds, warmup=0, clock=self.clock, device=self.device)
            rows.append({
                "": name, "median s": found[name].median, "spread": found[name].spread,
                "ratio": found[name].times_as_fast_as(found[next(iter(kept))]),
                "weights MiB": weight_bytes(network) / 2**20, "peak GiB": (peak - held) / 2**30 if peak else None,
                "apart": float((result - expected).norm() / expected.norm()) if len(rows) else None,
                **found[name].to_json(),
            })  # fmt: skip
            del call, network
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return report.Section(title, text, COLUMNS, rows)

    def _allocated(self, counter: str) -> int:
        return int(getattr(torch.cuda, counter)(self.device)) if self.device.type == "cuda" else 0


# ---- the network --------------------------------------------------------------------------------------


def sampling(scale: Scale, measure: Measure, *, compiled: bool) -> report.Section:
    """The loop from noise to latents."""
    device, dtype, network = measure.device, scale.dtype, scale.network
    captions = _drawn(2, WORDS, network.caption_channels or 0).to(device, dtype)
    noise = _drawn(1, network.channels[0], scale.frames, scale.latent, scale.latent).to(device, dtype)

    def ours(kind: str | None = None, compile_it: bool = False) -> tuple[Call, nn.Module]:
        model: Any = quantize(_network(network, dtype), kind, device)
        for block in model.blocks if compile_it else ():
            block.compile()
        return (lambda: walk(model, captions, noise, scale.steps)), model

    def theirs() -> tuple[Call, nn.Module]:
        from models.convert_t2v import to_diffusers

        return _their_pipeline(
            model := to_diffusers(_network(network, dtype)).to(device), captions, noise, scale
        ), model

    makers: dict[str, Callable[[], tuple[Call, nn.Module]]] = {"diffusers' pipeline": theirs} if _diffusers() else {}
    makers["ours"] = ours
    if compiled:
        makers["ours, compiled"] = lambda: ours(compile_it=True)
    for kind in tuple(QUANTIZERS) if device.type == "cuda" else ("int8",):
        makers[f"ours, {kind}"] = partial(ours, kind)
    text = (
        f"{scale.frames} frames, latents {scale.latent} x {scale.latent}, {scale.steps} DDIM steps with guidance "
        f"{GUIDANCE:g}, {_name(dtype)}; the same weights and noise in all rows."
    )
    return measure.table("Sampling", text, makers)


@torch.no_grad()
def walk(model: LatteT2V, captions: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Our own DDIM on our own schedule, (1, C, F, h, w): what sampling a text network takes without diffusers."""
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
    """The same random weights each time; none of them zero."""
    torch.manual_seed(0)
    model = LatteT2V(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval().to(dtype)


# ---- decoder and text encoder -------------------------------------------------------------------------


def decoding(scale: Scale, measure: Measure, *, compiled: bool) -> report.Section:
    """From latents to frames, with layouts, compiled, and in parts."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes: Any = {"block_out_channels": scale.decoder, "layers_per_block": 2, "sample_size": 8 * scale.latent}
    vae = AutoencoderKL(down_block_types=blocks[0], up_block_types=blocks[1], **sizes).to(scale.dtype).eval()
    latents = _drawn(1, scale.frames, 4, scale.latent, scale.latent).to(measure.device)
    precision = {torch.float32: "fp32", torch.float16: "fp16"}[scale.dtype]

    def maker(
        channels_last: bool = False, compile_it: bool = False, chunk: int = scale.frames, method: str = ""
    ) -> Any:
        def make() -> tuple[Call, nn.Module]:
            network = deepcopy(vae).to(measure.device)
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
    return measure.table("Decoding", text, makers)


def encoding(scale: Scale, measure: Measure) -> report.Section:
    """A prompt of 120 pieces."""
    from transformers import T5Config, T5EncoderModel

    config: Any = T5Config(**scale.t5, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    words = torch.randint(3, scale.t5["vocab_size"], (1, 120), generator=torch.Generator().manual_seed(0))

    def maker(kind: str | None) -> Any:
        def make() -> tuple[Call, nn.Module]:
            with torch.device("meta"):  # its own initialisation of five billion numbers would take minutes
                network = T5EncoderModel(config).eval().requires_grad_(False).to(scale.dtype)
            generator = torch.Generator().manual_seed(0)
            for parameter in network.to_empty(device="cpu").parameters():
                parameter.uniform_(-0.03, 0.03, generator=generator)
            network = quantize(network, kind, measure.device)
            return (lambda: network(words.to(measure.device))[0]), network

        return make

    kinds = tuple(QUANTIZERS) if measure.device.type == "cuda" else ("int8",)
    makers = {_name(scale.dtype): maker(None), **{kind: maker(kind) for kind in kinds}}
    return measure.table("Encoding a prompt", "T5 with a gated MLP, 120 pieces.", makers)


# ---- helpers ------------------------------------------------------------------------------------------


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all weights, quantised or not."""
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


def _diffusers() -> bool:
    from importlib.util import find_spec

    return find_spec("diffusers") is not None
