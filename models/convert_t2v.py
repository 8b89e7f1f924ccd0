"""Weights of the text-conditioned network: from diffusers, the official code and PixArt-alpha, and back to diffusers.

Weights of diffusers and of the official code have the same names and load strictly. An image network of PixArt-alpha,
in diffusers' format or its authors' `.pth`, becomes a video network that at first treats each frame as an image.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checks import require
from common.storage import write_folder_atomically

from .config_t2v import CLASS_NAME, LATTE_1, LatteT2VConfig
from .convert import InitReport, load_weights, read_state_dict, require_finite
from .hub import find_folder, read_json
from .latte_t2v import LatteT2V

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS = "diffusion_pytorch_model"  # file name in diffusers, without suffix
SUBFOLDER = "transformer"  # in the folder of a complete pipeline
# Written by diffusers, by the official code, and for PixArt-alpha by old and new diffusers.
CLASS_NAMES = (CLASS_NAME, "LatteT2V", "Transformer2DModel", "PixArtTransformer2DModel")
TEMPORAL = "temporal_transformer_blocks."
SCALE = "temporal_position_scale"  # our own key in config.json, while an image network is trained into a video network

COMPARED_WORDS = 8  # caption length in a comparison with diffusers

# Names in PixArt-alpha -> in diffusers; a tensor with several names is their concatenation along dimension 0.
PIXART_NAMES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.scale_shift_table": ("scale_shift_table",),
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
# Checkpoint keys that the network does not have -> why they are ignored.
IGNORED = {
    r"pos_embed(\.pos_embed)?|temp_pos_embed": "a table of positions; ours is computed",
    r"(caption_projection|y_embedder)\.y_embedding": "the empty caption of training; samplers encode an empty prompt",
}
_SIZES = r"(csize_embedder|ar_embedder)\..*|.*\.(resolution_embedder|aspect_ratio_embedder)\..*"
IGNORED_OF_IMAGES = {_SIZES: "the image's size and shape as a condition, which Latte does not have"}


def find_network(source: str, revision: str | None, key: str) -> Path:
    """Returns the folder or file `source`, or a hub name's downloaded folder; FileNotFoundError names `key`."""
    if Path(source).exists():
        return Path(source)
    return find_folder(source, revision, key, [f"{SUBFOLDER}/*", CONFIG_FILE, f"{WEIGHTS}*"])


def load_t2v(source: str | Path, **options: Any) -> LatteT2V:
    """Returns the network in a folder or file, in evaluation mode; see `convert_t2v` for `options`."""
    model, report = convert_t2v(source, **options)
    log.info("%s\n%s", source, report)
    return model


def convert_t2v(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    variant: str | None = None,
    prefer: str = "ema",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> tuple[LatteT2V, InitReport]:
    """Returns the network in a folder or file, in evaluation mode, and a report on every tensor.

    Weights without temporal blocks are an image network's: the new temporal blocks start as the identity, and
    `temporal_position_scale` at 0.

    Args:
        source: a folder in diffusers' format (a complete pipeline or its transformer), or a file of weights:
            `.safetensors`, or `.pt`, `.pth` or `.bin`, from which only tensors are unpickled.
        config: content of a `config.json`. Default: the file next to the weights, else that of Latte-1, which
            also fits PixArt-alpha at 512 pixels.
        variant: `fp16` for files named `diffusion_pytorch_model.fp16.safetensors`.
        prefer: set of weights to take from a training checkpoint, see `read_state_dict`.
        dtype: the network's; None keeps the file's.
        options: options of `LatteT2V`.

    Raises: FileNotFoundError, ValueError if a part is missing, broken or does not fit; all differences are listed.
    """
    weights, keys = _read(Path(source), config, variant, prefer)
    table = weights.get("pos_embed")  # in PixArt's own files, which have no config
    weights, left = _translate(weights)
    is_text = "caption_projection.linear_1.weight" in weights
    require(is_text, f"{source} is not a text-conditioned network: it has no caption_projection")
    if SCALE in keys:
        options.setdefault(SCALE, keys.pop(SCALE))
    name = str(source) if keys else f"{source}, read as Latte-1 because there is no {CONFIG_FILE} next to it,"
    own: dict[str, Tensor] = {}
    if any(key.startswith(TEMPORAL) for key in weights):
        with torch.device("meta"):  # skips initialisation, since all weights are replaced
            model = LatteT2V.from_config(keys or LATTE_1, **options)
        load_weights(model, weights, name, assign=True)
    else:
        weights, more = _drop_keys(weights, IGNORED | IGNORED_OF_IMAGES)
        keys.pop("use_additional_conditions", None)
        model = LatteT2V.from_config(keys or _pixart_config(table), **options)
        model.start_as_image_network()
        own = {key: value for key, value in model.state_dict().items() if key.startswith(TEMPORAL)}
        load_weights(model, own | weights, name)
        left |= more
    reason = "an image network has no frames; ours starts as the identity"
    report = InitReport(taken=list(weights), left_theirs=left, left_ours=dict.fromkeys(own, reason))
    return model.to(dtype).eval() if dtype else model.eval(), report


def save_t2v(model: LatteT2V, folder: str | Path) -> Path:
    """Writes the network atomically as a folder that diffusers' class loads. Raises: FileExistsError."""
    folder = require_new(Path(folder))
    config = model.config.to_dict()
    if model.temporal_position_scale != 1:
        config[SCALE] = model.temporal_position_scale
        log.warning("%s: %s is %g, but diffusers ignores it and uses 1", folder, SCALE, model.temporal_position_scale)

    def write(new: Path) -> None:
        weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
        save_file(weights, new / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return write_folder_atomically(folder, write)


def require_new(folder: Path) -> Path:
    """Returns the folder if it is missing or empty. Raises: FileExistsError otherwise."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: choose another, so that nothing is overwritten")
    return folder


def to_diffusers(model: LatteT2V) -> nn.Module:
    """Returns diffusers' `LatteTransformer3DModel`, which shares this network's weights."""
    from diffusers import LatteTransformer3DModel  # slow to import

    network = LatteTransformer3DModel.from_config(model.config.to_dict())
    network.to(model.dtype)
    network.load_state_dict(model.state_dict(), assign=True)
    return network.eval()


def compare_with_diffusers(model: LatteT2V, folder: Path) -> float:
    """Returns the largest difference from the output of diffusers' class with the weights in `folder`.

    Relative to the largest value, in fp32 on a small random clip; frame by frame for an image network.
    """
    from diffusers import LatteTransformer3DModel

    theirs = LatteTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    config, side = model.config, 2 * model.config.patch
    noise = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, config.channels[0], config.video_length, side, side, generator=noise),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, COMPARED_WORDS, config.caption_channels or 0, generator=noise),
        "enable_temporal_attentions": model.temporal_position_scale == 1,
    }
    with torch.no_grad():
        first, second = model.float()(**inputs).sample, theirs(**inputs).sample
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-12))


def _read(
    source: Path, config: Mapping[str, Any] | None, variant: str | None, prefer: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of `source`, and the content of its config.json, empty if there is none."""
    folder, files = _find_files(source, variant)
    weights: dict[str, Tensor] = {}
    for file in files:
        part = read_state_dict(file, prefer)
        require_finite(part, file.resolve())  # names the file rather than a link to it
        weights |= part
    described = folder / CONFIG_FILE
    keys = dict(config) if config is not None else read_json(described) if described.is_file() else {}
    kind, known = keys.get("_class_name", CLASS_NAME), ", ".join(CLASS_NAMES)
    require(kind in CLASS_NAMES, f"{folder} describes a {kind} network; the class must be one of {known}")
    return weights, keys


def _find_files(source: Path, variant: str | None) -> tuple[Path, list[Path]]:
    """Returns the folder of a network's config.json, and its weight files: the shards of an index, or one file."""
    if source.is_file():
        return source.parent, [source]
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder or file {source}")
    folder = next((each for each in (source / SUBFOLDER, source) if (each / CONFIG_FILE).is_file()), None)
    if folder is None:
        remedy = "`python -m tools.convert diffusers` writes such a folder from a training run"
        raise FileNotFoundError(
            f"{source} holds no network: neither {SUBFOLDER}/{CONFIG_FILE} nor {CONFIG_FILE}; {remedy}"
        )
    part = f".{variant}" if variant else ""
    index = folder / f"{WEIGHTS}.safetensors.index{part}.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        shards = list(listed.values()) if isinstance(listed, dict) else []
        inside = all(isinstance(name, str) and Path(name).name == name for name in shards)
        require(bool(shards) and inside, f"{index} is not an index of weight files in its folder; copy it again")
        return folder, [folder / name for name in sorted(set(shards))]
    names = [f"{WEIGHTS}{part}.safetensors", f"{WEIGHTS}{part}.bin"]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} holds no weights: neither {index.name} nor {' nor '.join(names)}")
    return folder, found[:1]


def _pixart_config(table: Tensor | None) -> LatteT2VConfig:
    """Returns the config of PixArt-alpha's XL network for the image size of its table of positions `(1, N, D)`."""
    return LATTE_1 if table is None else replace(LATTE_1, sample_size=math.isqrt(table.shape[1]) * LATTE_1.patch)


def _translate(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Renames weights to our names; returns them, and the reasons for ignored keys."""
    if not any(key.startswith("blocks.") for key in weights):
        return _drop_keys(weights, IGNORED)
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        block, name, kind = re.fullmatch(r"(?:(blocks\.\d+\.))?(.*?)(\.weight|\.bias)?", key, re.DOTALL).groups("")  # type: ignore[union-attr]
        names = PIXART_NAMES.get(name)
        if names is None:
            renamed[key] = value
            continue
        prefix = f"transformer_{block}" if block else ""
        parts = zip(names, value.chunk(len(names)))
        renamed |= {f"{prefix}{new}{kind}": part.clone() if len(names) > 1 else part for new, part in parts}
    return renamed, {}


def _drop_keys(weights: dict[str, Tensor], reasons: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Removes the keys that match a pattern in `reasons`; returns the other weights, and the removed keys' reasons."""
    left = {key: why for pattern, why in reasons.items() for key in weights if re.fullmatch(pattern, key)}
    return {key: value for key, value in weights.items() if key not in left}, left
