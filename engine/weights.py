"""Network weights in files: of checkpoints and runs, to start training, as a base for adapters, and exports."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from common.checks import require
from models.convert import init_from_dit, is_image_checkpoint, load_weights, read_state_dict, weights_digest
from models.convert_t2v import CONFIG_FILE, SUBFOLDER, TEMPORAL, convert_t2v, find_network
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import Adapter, LoraConfig, save_lora

from .build import build_model
from .checkpoint import (
    MANIFEST,
    CheckpointError,
    find_checkpoint,
    read_config,
    read_state,
    read_tensors,
    weights_file,
    write_folder,
)
from .config import Config
from .distributed import shards_like
from .optim import EMA

SIZES_OF_TRAINING = ("sample_size", "video_length")  # may differ: positions are computed
UNREAD = ("num_embeds_ada_norm", "dropout")  # unread by networks; training only


def load_model_weights(path: str | Path, weights: str = "ema") -> dict[str, Tensor]:
    """Loads the "ema" or "raw" weights of one of our checkpoint folders or runs, or of an official file."""
    if Path(path).is_file():
        return read_state_dict(path, prefer="ema" if weights == "ema" else "model")
    return load_checkpoint_weights(find_checkpoint(Path(path)), weights)


def load_checkpoint_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Loads `ema` or `raw` weights of an already verified checkpoint folder, adapters merged into their base."""
    file = weights_file(folder, weights)
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no {weights!r} weights ({file.name} is absent); use the other kind.")
    own, config = read_tensors(file), read_config(folder)
    if not config.lora.rank:
        return own
    source = f"{folder} holds adapters on train.init_from={config.train.init_from}"
    model = build_model(config)
    try:
        digest = load_base(model, config)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}, which cannot be loaded: {error}") from None
    if digest != read_state(folder).get("lora_base", ""):
        raise CheckpointError(f"{source}, whose weights have changed since training: restore the original ones.")
    whole = dict(model.state_dict())
    Adapter.from_weights(own, lambda rank: config.lora.scale, str(folder)).merge_into(whole)
    return whole


# ---- the start of training -------------------------------------------------------------------------


def initialise(model: Latte | LatteT2V, ema: EMA, config: Config, lora_base: str | None) -> list[str]:
    """Loads `train.init_from`, if set, into the network and its EMA; returns lines for the log."""
    source = config.train.init_from
    if source is None:
        return []
    if lora_base is not None:
        return [f"adapters on base weights {source} ({lora_base[:12]}), which stay frozen"]
    if isinstance(model, LatteT2V):
        notes = _load_text(model, source, config)
    else:
        weights, from_images = _read_weights(Path(source))
        placed = shards_like(weights, model.state_dict())
        if from_images:
            notes = str(init_from_dit(model, placed)).splitlines()
        else:
            load_weights(model, placed, source)
            notes = [f"initial weights: {source}"]
    ema.load_state_dict(model.state_dict())
    return notes


def _read_weights(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Returns the EMA weights of a file, run or checkpoint folder, and whether they are an image DiT's."""
    if path.is_file():
        weights = load_model_weights(path)
        return weights, is_image_checkpoint(weights)
    folder = find_checkpoint(path)
    return load_checkpoint_weights(folder, "ema"), read_config(folder).model.variant == "image"


def _load_text(model: LatteT2V, source: str, config: Config) -> list[str]:
    """Loads a text network; from an image network, temporal blocks start as the identity. Returns log lines.

    `source`: one of our checkpoint or run folders, a diffusers-format folder, or a weights file.
    """
    weights, notes = _read_text_weights(model, source)
    own = model.state_dict()
    temporal = {key: value for key, value in own.items() if key.startswith(TEMPORAL)}
    from_images = bool(temporal) and not any(key.startswith(TEMPORAL) for key in weights)
    ramp = config.train.temporal_ramp_steps
    require(
        ramp > 0 or not from_images,
        f"train.init_from={source} is an image network, which has no temporal positions: introduce them over a number "
        "of steps, e.g. train.temporal_ramp_steps=1000.",
    )
    require(
        ramp == 0 or from_images,
        f"train.temporal_ramp_steps={ramp} is for a video network that starts from an image network; "
        f"train.init_from={source} is not one: set it to 0.",
    )
    load_weights(model, {**(temporal if from_images else {}), **shards_like(weights, own)}, source)
    if from_images:
        model.start_as_image_network()
        notes.append(f"temporal blocks start as the identity; temporal positions fade in over {ramp} steps")
    return [f"initial weights: {source}", *notes]


def _read_text_weights(model: LatteT2V, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Returns weights under our names, and the conversion report's lines."""
    path = find_network(source, None, "train.init_from")
    if path.is_dir() and not any((path / each / CONFIG_FILE).is_file() for each in ("", SUBFOLDER)):
        return load_model_weights(path), []
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
    if loaded.temporal_position_scale == 0:  # `convert_t2v` added temporal blocks to an image network
        weights = {key: value for key, value in weights.items() if not key.startswith(TEMPORAL)}
    return weights, str(report).splitlines()


def temporal_position_scale(config: Config, step: int) -> float:
    """Returns the scale of temporal positions at `step`: 1, or rising from 0 after a start from an image network."""
    ramp = config.train.temporal_ramp_steps
    return min(1.0, step / ramp) if ramp else 1.0


def ramp_temporal_positions(config: Config, step: int, *models: nn.Module) -> None:
    """Sets that scale in text networks; others have none."""
    for model in models if config.model.is_text else ():
        model.temporal_position_scale = temporal_position_scale(config, step)  # type: ignore[assignment]


def load_base(model: nn.Module, config: Config) -> str:
    """Loads all base weights of a LoRA run (`train.init_from`) into `model`; returns their SHA-256."""
    source = str(config.train.init_from)
    if isinstance(model, LatteT2V):
        _load_text(model, source, config)
    else:
        load_weights(cast(Latte, model), load_model_weights(source), source)
    return weights_digest(model.state_dict())


# ---- exports ---------------------------------------------------------------------------------------


def export_weights(source: Path, target: Path, weights: str = "ema") -> Path:
    """Copies one set of weights and the config of checkpoint `source`: all that sampling needs.

    Adapters are merged into their base weights, so the copy is self-contained.
    """
    folder = find_checkpoint(source)
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    require(
        not taken or ((target / MANIFEST).is_file() and not (target / "optim.safetensors").exists()),
        f"{target} exists and is not a weights export; name a new folder.",
    )
    config = replace(read_config(folder), lora=LoraConfig())
    state = read_state(folder)
    for key in ("guard", "lora_base"):  # for training only
        state.pop(key, None)
    file = weights_file(folder, weights).stem
    return write_folder(target, {file: load_checkpoint_weights(folder, weights)}, state, config)


def export_adapter(source: Path, target: Path, weights: str = "ema") -> Path:
    """Writes the adapters of checkpoint `source` as a folder that peft loads; returns it."""
    folder = find_checkpoint(source)
    config = read_config(folder)
    require(config.lora.rank > 0, f"{folder} holds a whole network and no adapters: its lora.rank is 0.")
    require(not target.exists(), f"{target} exists; name a new folder.")
    return save_lora(read_tensors(weights_file(folder, weights)), config.lora, target)
