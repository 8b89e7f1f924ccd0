"""What adapters (`lora.rank`) are trained beside: the weights of `train.init_from`, all of the network's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from models.convert import load_weights, weights_digest
from models.latte_t2v import LatteT2V
from models.lora import Adapter

from . import checkpoint as ckpt
from .build import build_model
from .config import Config
from .text_start import start_text_network


def load_base(model: nn.Module, config: Config) -> str:
    """Take these weights into `model`, as it was built; returns their SHA-256.

    Raises: ValueError, OSError where they cannot be had, or leave a part of the network as it was drawn.
    """
    source = str(config.train.init_from)
    if isinstance(model, LatteT2V):
        start_text_network(model, source, config)
    else:
        load_weights(model, ckpt.load_model_weights(source), source)
    return weights_digest(model.state_dict())


def beside_base(adapters: dict[str, Tensor], config: Config, digest: str, folder: Path) -> dict[str, Tensor]:
    """The whole network: `adapters` of the checkpoint `folder`, merged into the weights that `digest` is of.

    Raises: CheckpointError where those are not there, or are others than in training.
    """
    told = f"{folder} holds adapters beside train.init_from={config.train.init_from}"
    model = build_model(config)
    try:
        found = load_base(model, config)
    except (OSError, ValueError) as error:
        raise ckpt.CheckpointError(f"{told}, which cannot be had: {error}") from None
    if found != digest:
        raise ckpt.CheckpointError(f"{told}, but those are other weights than in training: put the same back.")
    weights = dict(model.state_dict())
    Adapter.from_weights(adapters, lambda rank: config.lora.scale, str(folder)).merge_into(weights)
    return weights
