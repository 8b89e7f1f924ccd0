"""Configuration of sample/sample_t2x.py: defines, checks and translates the keys of configs/t2x/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.checks import Limit, at_least, check_limits, check_read_only_with, one_of, optional, require, within
from datasets.config import DataConfig
from diffusion.scheduled import SCHEDULERS
from diffusion.windows import WINDOW_METHODS
from engine.config import read_yaml, window_overlap
from engine.config.loading import one_line
from engine.config.sections import SAMPLE_LIMITS, check_frame_keys
from engine.keys import TEXT_DROPPED
from models.quantize import QUANTIZERS

from .command import MAX_VIDEOS
from .given import Windows, read_given

# official keys that do not exist here -> remedy
REPLACED = {
    "use_fp16": "write precision: fp16, bf16 or fp32",
    "use_compile": "write compile: true or false",
    "cfg_scale": "write guidance_scale",
    **{key: f"{reason} Leave the key out" for key, reason in TEXT_DROPPED.items()},
}
TRANSLATE = " (`python -m tools.convert config` translates whole official files)"
SHARED = ("seed", "eta", "guidance_scale", "lora_scale", "precision", "given_frames", "window")  # limits as in `sample`
LIMITS = {
    "video_length num_sampling_steps decode_chunk_size fps": at_least(1),
    "image_size": Limit(
        "a height and a width divisible by 8",
        lambda size: len(size) == 2 and all(side >= 8 and side % 8 == 0 for side in size),
    ),
    "num_videos_per_prompt": within(1, MAX_VIDEOS),
    "sample_method": one_of(SCHEDULERS),
    "quantize_text_encoder quantize_transformer": optional(one_of(QUANTIZERS)),
    "window_method": one_of(WINDOW_METHODS),
    **{key: SAMPLE_LIMITS[key] for key in SHARED},
}


@dataclass(frozen=True)
class T2XConfig:
    """Keys are named as in the official files. Raises: ValueError, naming the key, for a value out of range."""

    pretrained_model_path: str = "maxin-cn/Latte-1"  # folder with transformer/, vae/, ..., or hub name
    revision: str | None = None  # of a hub name
    ckpt: str | None = None  # instead of both: a training run or checkpoint; its config sets the defaults
    transformer: str | None = None  # replacement network weights, as models.convert_t2v.load_t2v reads
    save_img_path: str = "results/t2v"  # folder to write into
    text_prompt: list[str] = field(default_factory=list)
    prompt_file: str | None = None  # one prompt per line, appended to text_prompt
    negative_prompt: str = ""
    clean_caption: bool = True
    video_length: int = 16  # frames; 1: an image
    image_size: list[int] = field(default_factory=lambda: [512, 512])  # height, width in pixels
    num_videos_per_prompt: int = 1
    seed: int = 0
    sample_method: str = "DDIM"
    num_sampling_steps: int = 50
    eta: float = 0.0  # of DDIM
    guidance_scale: float = 7.5  # 1: no guidance
    beta_start: float | None = None  # null, here and in the next two: as in the scheduler
    beta_end: float | None = None
    beta_schedule: str | None = None
    variance_type: str = "learned_range"  # of DDPM, if the network predicts a variance
    enable_temporal_attentions: bool = True  # false: frames are independent
    enable_vae_temporal_decoder: bool = False
    decode_chunk_size: int = 16  # frames decoded at a time
    vae_slicing: bool = False
    vae_tiling: bool = False
    lora: str | None = None  # peft-format folder of adapters to merge into the network
    lora_scale: float = 1.0  # scale of the adapters
    precision: str = "fp16"  # of text encoder, network and decoder
    quantize_text_encoder: str | None = None  # int8 on any device; bnb8, bnb4 on CUDA
    quantize_transformer: str | None = None
    compile: bool = False  # each block of the network, and the decoder
    cpu_offload: bool = False  # network and decoder take turns on the device
    fps: int = 8
    first_frame: list[str] | None = None  # first frames of the videos, used in turn
    last_frame: list[str] | None = None  # last frames of the videos, used in turn
    given: list[str] | None = None  # videos to continue, used in turn
    given_frames: int = 1  # number of last frames of `given` to continue from
    window: int | None = None  # longer videos are sampled in windows of this many frames; null: all at once
    overlap: int | None = None  # frames that consecutive windows share; null: a quarter of a window
    window_method: str = "fused"  # fused | autoregressive (networks trained with given frames)

    def __post_init__(self) -> None:
        check_limits(self, "", LIMITS)
        check_read_only_with(self, "", {"eta": "sample_method=DDIM", "lora_scale": "lora"})
        check_frame_keys(self, "")
        start, end = self.beta_start or 1e-9, self.beta_end or 0.999
        require(0 < start <= end < 1, "beta_start and beta_end must satisfy 0 < start <= end < 1.")
        require(not (self.ckpt and self.transformer), "ckpt and transformer both name a network: give only one.")
        require(
            not (self.cpu_offload and self.quantize_transformer in ("bnb8", "bnb4")),
            f"quantize_transformer={self.quantize_transformer} stays on the GPU: leave cpu_offload out, or use int8.",
        )
        if self.first_frame or self.last_frame or self.given:
            is_square = self.image_size[0] == self.image_size[1]
            require(is_square, f"given frames are cropped square: image_size must be square, got {self.image_size}.")
            require(self.video_length > 1, "given frames leave nothing to sample at video_length=1.")

    def prompts(self) -> list[str]:
        """Returns the prompts of list and file. Raises: ValueError if there are none."""
        prompts = [*self.text_prompt, *(read_prompts(Path(self.prompt_file)) if self.prompt_file else [])]
        require(bool(prompts), "there is no prompt: give --prompt TEXT, text_prompt or prompt_file.")
        return prompts

    def settings(self) -> dict[str, Any]:
        """Returns the `Settings` of a Generator, by name; reads given frames."""
        frames, (height, width) = self.video_length, self.image_size
        windows = Windows(self.window, window_overlap(self), self.window_method) if self.window else None
        data = DataConfig(num_frames=frames, image_size=height, frame_interval=1)
        return {
            "seed": self.seed,
            "steps": self.num_sampling_steps,
            "method": self.sample_method,
            "eta": self.eta,
            "guidance_scale": max(1.0, self.guidance_scale),
            "batch_size": 1,
            "num_frames": frames,
            "image_size": (height, width),
            "given": read_given(self, data, prefix=""),
            "windows": windows,
        }


KEYS = [item.name for item in fields(T2XConfig)]


def load_t2x_config(path: str | Path | None, settings: dict[str, Any], base: dict[str, Any] | None = None) -> T2XConfig:
    """Merges and checks defaults, `base`, YAML file and `settings`. Raises: FileNotFoundError, ValueError."""
    values = read_yaml(Path(path)) if path else {}
    require(isinstance(values, dict), f"{path} must hold keys and values")
    for key in values:
        close = get_close_matches(str(key), KEYS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(KEYS)}"
        require(key in KEYS, f"{path}: unknown key {key!r}: {REPLACED[key] + TRANSLATE if key in REPLACED else hint}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(T2XConfig), base or {}, values, settings)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or path}: {one_line(error)}") from None


def read_prompts(path: Path) -> list[str]:
    """Reads prompts from a text file, one per line; skips empty lines and lines that start with #."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 text") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    require(bool(prompts), f"prompt file {path} holds no prompt: write one per line")
    return prompts
