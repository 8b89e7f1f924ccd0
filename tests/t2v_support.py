"""Tiny random parts of a text-to-video pipeline, all of diffusers' and transformers' own classes."""

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from models.latte_t2v import LatteT2V

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "attention_bias": True,
    "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2, "video_length": 4,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 12,
    "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
}  # fmt: skip
IMAGE = {key: value for key, value in CONFIG.items() if key != "video_length"}
WORDS = 5  # of a caption's features


def randomize(network: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Every parameter drawn anew, so that nothing is zero or left out by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return network.eval()


def theirs(seed: int = 0, **changes: Any) -> LatteTransformer3DModel:
    return randomize(LatteTransformer3DModel(**{**CONFIG, **changes}), seed)  # type: ignore[return-value]


def pixart(**changes: Any) -> PixArtTransformer2DModel:
    return randomize(PixArtTransformer2DModel(**{**IMAGE, **changes}), seed=5)  # type: ignore[return-value]


def ours_of(network: nn.Module, **options: Any) -> LatteT2V:
    model = LatteT2V.from_config(dict(network.config), **options).to(next(network.parameters()).dtype)
    model.load_state_dict(network.state_dict())
    return model.eval()


def inputs(
    frames: int = 4,
    size: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    captions: int | None = None,
) -> dict[str, Tensor]:
    """Arguments of `forward`; `captions` of each sample with images, else one."""
    generator = torch.Generator().manual_seed(seed)
    rows = (2,) if captions is None else (2, captions)
    return {
        "hidden_states": torch.randn(2, 4, frames, *size, generator=generator).to(dtype),
        "timestep": torch.tensor([7, 991]),
        "encoder_hidden_states": torch.randn(*rows, WORDS, 12, generator=generator).to(dtype),
    }


def tiny_tokenizer() -> T5Tokenizer:
    """Words are spelled; the first three tokens are T5's."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase + string.punctuation]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_text_encoder(seed: int = 0) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(vocab_size=64, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def tiny_vae(temporal: bool = False) -> nn.Module:
    """An image autoencoder, or the one that decodes clips; four latent channels, half the size."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    if temporal:
        return AutoencoderKLTemporalDecoder(down_block_types=down, block_out_channels=(32, 32)).eval()
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    return AutoencoderKL(down_block_types=down, up_block_types=up, **sizes).eval()


def tiny_pipeline(transformer: nn.Module, *, temporal: bool = False) -> LattePipeline:
    """diffusers' pipeline around a network; quiet."""
    pipeline = LattePipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(temporal),
        transformer=transformer,
        scheduler=DDIMScheduler(clip_sample=False, beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
