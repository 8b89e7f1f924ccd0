"""The text network that a configuration describes."""

from __future__ import annotations

from dataclasses import replace

from common.checks import require
from models.config_t2v import LATTE_1, LatteT2VConfig

from .rules import Config


def text_network_config(config: Config) -> LatteT2VConfig:
    """Returns size and kind of the text network: Latte-1's, or of that kind in another size.

    Latte-1 keeps the clip size of its original training, whatever it is trained on now: positions are computed.
    """
    size, channels = config.model.size, config.codec.latent_channels
    is_latte_1 = config.model.name == "Latte-1"
    require(
        not is_latte_1 or (channels, config.text.caption_channels) == (LATTE_1.in_channels, LATTE_1.caption_channels),
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
        sample_size=LATTE_1.sample_size if is_latte_1 else config.latent_size,
        caption_channels=config.text.caption_channels,
        video_length=LATTE_1.video_length if is_latte_1 else config.data.num_frames,
    )
