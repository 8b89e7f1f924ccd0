"""Size and kind of the text-to-video network of a configuration."""

from __future__ import annotations

from dataclasses import replace

from common.checks import require
from models.config_t2v import LATTE_1, LatteT2VConfig

from .config import Config


def text_network_config(config: Config) -> LatteT2VConfig:
    """Returns the size and kind of the text network: Latte-1's, or the same kind in another size.

    Latte-1 keeps the clip size that it was first trained on, because its positions are computed.
    """
    size, channels = config.model.size, config.codec.latent_channels
    named = config.model.name == "Latte-1"
    require(
        not named or (channels, config.text.caption_channels) == (LATTE_1.in_channels, LATTE_1.caption_channels),
        f"model.name=Latte-1 takes {LATTE_1.in_channels} latent channels and captions {LATTE_1.caption_channels} wide, "
        f"not codec.latent_channels={channels} and text.caption_channels={config.text.caption_channels}.",
    )
    return replace(
        LATTE_1,
        num_attention_heads=size.num_heads,
        attention_head_dim=size.hidden_size // size.num_heads,
        cross_attention_dim=size.hidden_size,
        num_layers=size.depth // (1 if config.model.name == "custom-t2i" else 2),
        patch_size=size.patch_size,
        in_channels=channels,
        out_channels=channels * (2 if config.model.learn_sigma else 1),
        sample_size=LATTE_1.sample_size if named else config.latent_size,
        caption_channels=config.text.caption_channels,
        video_length=LATTE_1.video_length if named else config.data.num_frames,
    )
