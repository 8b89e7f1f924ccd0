"""Initial weights of a text network: ours, Latte's in diffusers' or the official format, or an image network's."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from models.convert import load_weights
from models.convert_t2v import CONFIG_FILE, SUBFOLDER, TEMPORAL, convert_t2v, find_network
from models.latte_t2v import LatteT2V

from . import checkpoint as ckpt
from .config import Config, require
from .distributed import shard_like

SIZES_OF_TRAINING = ("sample_size", "video_length")  # may differ: positions are computed
UNREAD = ("num_embeds_ada_norm", "dropout")  # by any network; for training alone


def start_text_network(model: LatteT2V, source: str, config: Config) -> list[str]:
    """Take the weights of `source` into `model`; of an image network, temporal blocks start as the identity.

    Args:
        source: a checkpoint or run folder of ours; a folder in diffusers' format; or a file of weights.

    Returns:
        what to tell.

    Raises: ValueError, OSError where they do not fit or `train.temporal_ramp_steps` does not suit them.
    """
    weights, notes = _weights_of(model, source)
    own = {key: value for key, value in model.state_dict().items() if key.startswith(TEMPORAL)}
    from_images = bool(own) and not any(key.startswith(TEMPORAL) for key in weights)
    ramp = config.train.temporal_ramp_steps
    require(
        ramp > 0 or not from_images,
        f"train.init_from={source} is an image network, which knows no positions in time: let them in over a number of "
        "steps, e.g. train.temporal_ramp_steps=1000.",
    )
    require(
        ramp == 0 or from_images,
        f"train.temporal_ramp_steps={ramp} is for a video network begun from an image network, which "
        f"train.init_from={source} is not: set it to 0.",
    )
    shapes = model.state_dict()
    sharded = {
        key: shard_like(value, shapes[key]) if key in shapes and shapes[key].shape == value.shape else value
        for key, value in weights.items()
    }
    load_weights(model, {**(own if from_images else {}), **sharded}, source)
    if from_images:
        model.start_as_image_network()
        notes.append(f"temporal blocks start as the identity; positions in time grow from 0 to 1 in {ramp} steps")
    return [f"initial weights: {source}", *notes]


def _weights_of(model: LatteT2V, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by our names, and the report of a conversion."""
    path = find_network(source, None, "train.init_from")
    if path.is_dir() and not any((path / each / CONFIG_FILE).is_file() for each in ("", SUBFOLDER)):
        return ckpt.load_model_weights(path), []
    described = None if path.is_dir() else model.config.to_dict()
    loaded, report = convert_t2v(path, config=described, dtype=None)
    theirs, ours = asdict(loaded.config), asdict(model.config)
    differing = [key for key in ours if ours[key] != theirs[key] and key not in (*SIZES_OF_TRAINING, *UNREAD)]
    require(
        not differing,
        f"train.init_from={source} is another network: "
        + ", ".join(f"{key} {theirs[key]} there and {ours[key]} here" for key in differing),
    )
    weights = dict(loaded.state_dict())
    if loaded.temporal_position_scale == 0:  # an image network's, which `convert_t2v` gave temporal blocks
        weights = {key: value for key, value in weights.items() if not key.startswith(TEMPORAL)}
    return weights, str(report).splitlines()
