"""Convert a text-to-video or PixArt-alpha network to a folder that diffusers and this project load.

    python -m tools.convert_t2v SOURCE FOLDER [--dtype fp16] [--lora ADAPTERS]

SOURCE is a folder in diffusers' format (of a pipeline or of its transformer) or a file of weights: the official
LatteT2V's, or PixArt-alpha's, whose image network becomes a video network with temporal blocks that do nothing yet.
Prints which tensors were taken and left, then loads FOLDER with diffusers' class and compares the outputs of both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli

if TYPE_CHECKING:
    from models.latte_t2v import LatteT2V

WORDS = 8  # of the caption that both networks are compared on
BOUND = 1e-4  # relative, in fp32


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a folder in diffusers' format, a hub name, or a .safetensors, .pt or .pth file")
    parser.add_argument("folder", type=Path, help="where to write; must be new or empty")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json; default: beside the weights")
    parser.add_argument("--revision", metavar="NAME", help="of a hub name")
    parser.add_argument("--lora", metavar="DIR", help="adapters to merge into it, in peft's format")
    parser.add_argument("--lora_scale", type=float, default=1.0, metavar="X", help="so much of them (1)")
    parser.add_argument("--variant", help="e.g. fp16, of a folder with weights named so")
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="of a .pt file (default: ema)")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="to write in (default: as they are)")
    arguments = parser.parse_args(argv)

    from models.autoencoder import DTYPES
    from models.convert_t2v import convert_t2v, find_network, read_json, require_new, save_t2v
    from models.lora import merge_lora

    require_new(arguments.folder)
    model, report = convert_t2v(
        find_network(arguments.source, arguments.revision, "source"),
        config=read_json(arguments.config) if arguments.config else None,
        variant=arguments.variant,
        prefer=arguments.weights,
        dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
    )
    if arguments.lora:
        merge_lora(model, arguments.lora, arguments.lora_scale)
    save_t2v(model, arguments.folder)
    print(report)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: {count / 1e6:.2f} M parameters, {model.dtype}")
    difference = difference_to_diffusers(model, arguments.folder)
    print(f"largest difference to diffusers' output: {difference:.1e}" + ("" if difference <= BOUND else ", too much"))
    return 0 if difference <= BOUND else 1


def difference_to_diffusers(model: LatteT2V, folder: Path) -> float:
    """Largest difference of the two outputs in fp32, relative to the largest value, on a small random clip.

    A network that still computes images is compared frame by frame.
    """
    import torch
    from diffusers import LatteTransformer3DModel

    theirs = LatteTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    config, side = model.config, 2 * model.config.patch
    noise = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, config.channels[0], config.video_length, side, side, generator=noise),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, WORDS, config.caption_channels or 0, generator=noise),
        "enable_temporal_attentions": model.temporal_position_scale == 1,
    }
    with torch.no_grad():
        first, second = model.float()(**arguments).sample, theirs(**arguments).sample
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-12))


if __name__ == "__main__":
    cli.run(main)
