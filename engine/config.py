"""The typed configuration: defaults, then YAML, then `key=value`; unknown keys are refused with a hint."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from common.checks import require
from datasets.config import MAX_TIMEOUT_S, DataConfig
from datasets.recipes import CAPTIONED
from diffusion import ConditionConfig, DiffusionConfig
from diffusion.multistep import MULTISTEP_SOLVERS
from models import attention
from models.autoencoder import CodecConfig
from models.latte import LatteConfig
from models.lora import LoraConfig
from models.text_encoder import TextConfig

from .official_keys import DROPPED, RENAMED
from .optim import OptimConfig
from .removed import drop_removed

GAUSSIAN_METHODS = ("auto", "ddpm", "ddim", *MULTISTEP_SOLVERS)
FLOW_METHODS = ("auto", "euler", "heun", *MULTISTEP_SOLVERS)
METHODS = tuple(dict.fromkeys((*GAUSSIAN_METHODS, *FLOW_METHODS)))
TRAIN_PRECISIONS = ("fp32", "tf32", "bf16", "fp64")
SAMPLE_PRECISIONS = ("fp32", "bf16", "fp16")
LABEL_RULES = ("balanced", "random")
WINDOW_METHODS = ("auto", "autoregressive", "fused")
MAX_YAML_CHARACTERS = 65_536  # a config with every key takes 4,000
MAX_YAML_EVENTS = 10_000  # of the parser: two for each section and list, one for each key and value
MAX_YAML_DEPTH = 8  # file, section, list: 3
# What YAML 1.1 takes for a number in base 8 or 60: 010 is 8, 1:30 is 90, 1:30.5 is 90.5.
ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")
MAX_SEED = 2**63  # what a torch.Generator takes


@dataclass(frozen=True)
class TrainConfig:
    """The `train` section. Steps are optimiser steps; batch_size is per process and micro-step."""

    output_dir: str = "results/run"  # config.yaml, metrics.jsonl, checkpoints/ are written into it
    max_steps: int = 1_000_000
    batch_size: int = 5
    grad_accum_steps: int = 1
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    log_every: int = 100
    checkpoint_every: int = 10_000  # and always at max_steps
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    keep_every: int = 0  # and those at multiples of this step; 0: none
    async_checkpoint: bool = False  # write them in a thread beside the training
    resume: str = "auto"  # auto: the newest checkpoint in output_dir; never; or one to start from where it has none
    init_from: str | None = None  # weights only: our checkpoint, an official .pt, or an image DiT's
    temporal_ramp_steps: int = 0  # text network begun from an image network: positions in time grow from 0 to 1
    seed: int = 0
    precision: str = "fp32"  # fp32 | tf32 | bf16 (autocast over fp32 weights) | fp64 (to prove equalities)
    compile: bool = False  # torch.compile each block in place
    run_ahead: bool = True  # queue the next step before a step's numbers are read; false: wait for each
    attention: str = "auto"  # auto | fused | plain (the reference): docs/attention.md
    parallel: str = "ddp"  # ddp | fsdp (weights, gradients, moments and average sharded over the ranks)
    drift_check_every: int = 1000  # steps between comparisons of the ranks' weights, bit for bit; 0: never
    timeout_s: float = 1800.0  # a collective that takes longer ends the run; until the first step at least 600
    hang_timeout_s: float = 900.0  # a step that takes longer has its stacks written to errors/; 0: never

    def __post_init__(self) -> None:
        for key in ("max_steps", "batch_size", "grad_accum_steps", "log_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"train.{key} must be at least 1, not {getattr(self, key)}.")
        for key in ("keep_last", "keep_every", "temporal_ramp_steps", "drift_check_every", "hang_timeout_s"):
            value = getattr(self, key)
            require(0 <= value < float("inf"), f"train.{key} must be zero or more and finite, not {value}.")
        require(0 <= self.seed < MAX_SEED, f"train.seed must be zero or more and below 2**63, not {self.seed}.")
        for key in ("timeout_s", "hang_timeout_s"):
            value = getattr(self, key)
            require(value <= MAX_TIMEOUT_S, f"train.{key} must be at most {MAX_TIMEOUT_S:.0f} (a year), not {value}.")
        require(self.timeout_s > 0, f"train.timeout_s must be positive, not {self.timeout_s}.")
        require(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), not {self.ema_decay}.")
        choices_of = {"precision": TRAIN_PRECISIONS, "parallel": ("ddp", "fsdp"), "attention": attention.CHOICES}
        for key, choices in choices_of.items():
            value = getattr(self, key)
            require(value in choices, f"train.{key} must be one of {', '.join(choices)}, not {value!r}.")
        require(bool(self.output_dir), "train.output_dir must name a folder.")


@dataclass(frozen=True)
class SampleConfig:
    """The `sample` section: what sample/sample.py does where its flags are silent."""

    ckpt: str | None = None  # our checkpoint or run folder, or an official .pt
    save_video_path: str = "results/samples"
    num_videos: int = 4
    labels: list[str] | None = None  # class numbers or names to sample; null: all classes. Text network: captions
    label_rule: str = "balanced"  # balanced: in turn by index | random: drawn by (seed, index)
    seed: int = 0
    steps: int = 250
    # ddpm | ddim for Gaussian diffusion, euler | heun for flow, dpm_solver++ | sde_dpm_solver++ | unipc for both;
    # auto: ddpm, or euler for flow
    method: str = "auto"
    eta: float = 0.0  # DDIM only: 0 deterministic, 1 as noisy as DDPM
    guidance_scale: float = 1.0  # 1: no guidance
    guidance_interval: list[float] | None = None  # guide only noise levels from the first to the second, 0 to 1
    batched_guidance: bool = True  # conditional and unconditional in one call; false: one by one, in half the memory
    weights: str = "ema"  # ema | raw
    lora: str | None = None  # adapters to merge into the network: a folder in peft's format
    lora_scale: float = 1.0  # so much of them
    precision: str = "fp32"  # fp32 | bf16 | fp16
    cast_weights: bool = False  # the weights themselves in `precision`, in half the memory
    compile: bool = False  # torch.compile the network; on CUDA with CUDA graphs
    overlap_decode: bool = True  # on CUDA, decode a batch while the next is sampled
    batch_size: int = 4
    fps: int = 8
    first_frame: list[str] | None = None  # images that the videos begin with, in turn by index
    last_frame: list[str] | None = None  # images that they end with, in turn
    given: list[str] | None = None  # videos whose end they go on from, in turn
    given_frames: int = 1  # so many last frames of them
    window: int | None = None  # videos of more frames are sampled in windows of so many; null: all frames at once
    overlap: int | None = None  # frames that a window shares with the next; null: a quarter of the window
    window_method: str = (
        "auto"  # autoregressive (networks trained with given frames) | fused; auto: the first that fits
    )

    def __post_init__(self) -> None:
        for key in ("num_videos", "steps", "batch_size", "fps"):
            require(getattr(self, key) >= 1, f"sample.{key} must be at least 1, not {getattr(self, key)}.")
        require(bool(self.save_video_path), "sample.save_video_path must name a folder.")
        require(0 <= self.seed < MAX_SEED, f"sample.seed must be zero or more and below 2**63, not {self.seed}.")
        require(0 <= self.eta <= 1, f"sample.eta must be in [0, 1], not {self.eta}.")
        require(
            0 <= self.guidance_scale < float("inf"),
            f"sample.guidance_scale must be zero or more and finite, not {self.guidance_scale}.",
        )
        require(
            not (self.cast_weights and self.precision == "fp32"),
            "sample.cast_weights=true holds the weights in sample.precision: set that to bf16 or fp16.",
        )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval if len(self.guidance_interval) == 2 else (1, 0)
            require(
                0 <= low <= high <= 1,
                "sample.guidance_interval must be two numbers, 0 (data) <= first <= second <= 1 (noise), not "
                f"{self.guidance_interval}.",
            )
            require(self.guidance_scale != 1, "sample.guidance_interval is read only with a sample.guidance_scale.")
        require(abs(self.lora_scale) < float("inf"), f"sample.lora_scale must be finite, not {self.lora_scale}.")
        require(self.lora is not None or self.lora_scale == 1, "sample.lora_scale is read only with sample.lora.")
        words = {"method": METHODS, "weights": ("ema", "raw"), "precision": SAMPLE_PRECISIONS}
        for key, choices in (words | {"label_rule": LABEL_RULES, "window_method": WINDOW_METHODS}).items():
            value = getattr(self, key)
            require(value in choices, f"sample.{key} must be one of {', '.join(choices)}, not {value!r}.")
        check_frame_keys(self, "sample.")


@dataclass(frozen=True)
class MonitorConfig:
    """The `monitor` section: what is looked at every so many steps (0: never), at step 0 and at the last.

    It changes nothing in the training, so all of it may be changed when a run is continued.
    """

    val_every: int = 0  # the loss on held-out clips (data.val_path or data.val_share)
    val_clips: int = 64  # so many of them, or all
    val_buckets: int = 10  # equal parts of the timesteps; each clip is noised once in each
    sample_every: int = 0  # samples of average and raw weights, as the `sample` section says
    sample_videos: int = 4  # so many of each
    metric_every: int = 0  # the Frechet distance of samples of the average to held-out clips
    metric_videos: int = 256  # so many samples, and at most so many clips
    metric_detector: str | None = None  # its name: i3d, mobilenet_v2_clip, ... (docs/monitoring.md)
    metric_detector_path: str | None = None  # its file
    metric_detector_sha256: str | None = None  # what the file must be; null: whatever it is, which the log says

    def __post_init__(self) -> None:
        for key in ("val_every", "sample_every", "metric_every"):
            require(getattr(self, key) >= 0, f"monitor.{key} must be zero or more, not {getattr(self, key)}.")
        for key, least in {"val_clips": 1, "val_buckets": 1, "sample_videos": 1, "metric_videos": 2}.items():
            require(getattr(self, key) >= least, f"monitor.{key} must be at least {least}, not {getattr(self, key)}.")
        require(self.val_buckets <= 100, f"monitor.val_buckets must be at most 100, not {self.val_buckets}.")
        for item in fields(self):
            switch = f"{item.name.partition('_')[0]}_every"
            require(
                getattr(self, switch) > 0 or getattr(self, item.name) == item.default,
                f"monitor.{item.name} is read only with monitor.{switch}: set that too, or leave it out.",
            )


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Sections stand beside their owners."""

    model: LatteConfig = field(default_factory=LatteConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        """Check the pairs of keys that live in different sections."""
        grid = self.codec.downsample_factor * self.model.size.patch_size
        require(
            self.data.image_size % grid == 0,
            f"data.image_size={self.data.image_size} must be a multiple of {grid} "
            "(codec.downsample_factor x the patch size of model.name).",
        )
        tubelet = self.model.frames_per_token
        require(
            self.data.num_frames % tubelet == 0,
            f"data.num_frames={self.data.num_frames} must be a multiple of model.tubelet_size={tubelet}.",
        )
        self.condition.check_clip(self.data.num_frames, tubelet)
        require(
            not (self.diffusion.prediction == "flow" and self.model.learn_sigma),
            "diffusion.prediction=flow has no variance to learn: set model.learn_sigma=false.",
        )
        require(
            not (self.model.learn_sigma and self.diffusion.fixed_variance != "large"),
            "diffusion.fixed_variance is that of networks without a learned one: set model.learn_sigma=false, or "
            "leave it out.",
        )
        conditional = self.model.num_classes > 0 or self.model.is_text
        require(
            conditional or not self.sample.labels,
            "sample.labels: this network is unconditional (model.num_classes is 0); leave labels out.",
        )
        require(
            conditional or self.sample.label_rule == "balanced",
            f"sample.label_rule={self.sample.label_rule}: this network is unconditional (model.num_classes is 0).",
        )
        flow = self.diffusion.prediction == "flow"
        methods = FLOW_METHODS if flow else GAUSSIAN_METHODS
        require(
            self.sample.method in methods,
            f"sample.method={self.sample.method} does not belong to diffusion.prediction={self.diffusion.prediction}: "
            f"use {', '.join(methods)}.",
        )
        require(
            flow or self.sample.steps <= self.diffusion.num_steps,
            f"sample.steps={self.sample.steps} is more than the {self.diffusion.num_steps} steps of the diffusion "
            "(diffusion.num_steps).",
        )
        require(
            self.sample.eta == 0 or self.sample.method == "ddim",
            f"sample.eta={self.sample.eta} is read only with sample.method=ddim.",
        )
        dropout = self.text.caption_dropout if self.model.is_text else self.model.label_dropout
        require(
            self.sample.guidance_scale == 1 or (conditional and dropout > 0),
            f"sample.guidance_scale={self.sample.guidance_scale} needs a class-conditional network with a null "
            "label: set model.num_classes and a model.label_dropout (of a text network, text.caption_dropout) above 0, "
            "or sample.guidance_scale=1.",
        )
        self._check_text()
        require(
            not self.lora.rank or self.train.init_from is not None,
            f"lora.rank={self.lora.rank} trains adapters beside given weights: name these with train.init_from.",
        )
        require(
            not (self.lora.rank and self.train.parallel == "fsdp"),
            "lora.rank has little to shard: leave train.parallel at ddp.",
        )
        require(
            not (self.lora.rank and self.train.temporal_ramp_steps),
            f"train.temporal_ramp_steps={self.train.temporal_ramp_steps} is of a network begun from images, whose "
            "layers over time must be trained whole: leave lora.rank out.",
        )
        self._check_monitor()

    def _check_text(self) -> None:
        """A text network is trained on captions, and nothing else is."""
        captioned = self.data.name in CAPTIONED
        if not self.model.is_text:
            require(
                not captioned,
                f"data.name={self.data.name} has captions, which model.name={self.model.name} does not read: set "
                "model.name=custom-t2v or Latte-1, or data.name=folder.",
            )
            for item in fields(self.text):
                require(
                    getattr(self.text, item.name) == item.default,
                    f"text.{item.name} is read only by a text network: set model.name=Latte-1 or custom-t2v, or leave "
                    "it out.",
                )
            require(
                self.train.temporal_ramp_steps == 0,
                "train.temporal_ramp_steps is read only by a text network begun from an image network.",
            )
            return
        require(
            captioned,
            f"model.name={self.model.name} is trained on captions: set data.name=captions, not {self.data.name}.",
        )
        require(
            self.model.name != "custom-t2i" or self.data.num_frames == 1,
            f"model.name=custom-t2i has no layers over time: set data.num_frames=1, not {self.data.num_frames}.",
        )
        require(
            self.train.temporal_ramp_steps == 0 or self.train.init_from is not None,
            f"train.temporal_ramp_steps={self.train.temporal_ramp_steps} is of a network begun from an image network: "
            "name that with train.init_from, or set it to 0.",
        )

    def _check_monitor(self) -> None:
        """What the `monitor` section needs of the others."""
        held_out = self.data.val_path is not None or self.data.val_share > 0
        monitor = self.monitor
        for key in ("val_every", "metric_every"):
            every = getattr(monitor, key)
            require(
                held_out or not every,
                f"monitor.{key}={every} needs clips that are not trained on: set data.val_path to their folder, or "
                "data.val_share to a share of the clips of data.path.",
            )
        require(
            not (monitor.val_every and self.data.latents and self.data.val_path),
            "data.val_path is not in the cache of data.latents, where monitor.val_every reads: hold clips out of "
            "data.path with data.val_share instead.",
        )
        require(
            monitor.val_every > 0 or monitor.metric_every > 0 or self.data.val_path is None,
            "data.val_path is read only with monitor.val_every or monitor.metric_every: set one of them.",
        )
        require(
            not monitor.val_every or monitor.val_buckets <= self.diffusion.num_steps,
            f"monitor.val_buckets={monitor.val_buckets} is more than diffusion.num_steps={self.diffusion.num_steps}.",
        )
        require(
            not monitor.metric_every or bool(monitor.metric_detector and monitor.metric_detector_path),
            f"monitor.metric_every={monitor.metric_every} needs a detector: set monitor.metric_detector to its name, "
            "and monitor.metric_detector_path to its file.",
        )
        for key in ("sample_every", "metric_every"):
            require(
                not (getattr(monitor, key) and self.train.precision == "fp64"),
                f"monitor.{key}: train.precision=fp64 is there to prove equalities and is not sampled from; use fp32, "
                "tf32 or bf16.",
            )

    @property
    def latent_size(self) -> int:
        """Height and width of the latents, in latent pixels."""
        return self.data.image_size // self.codec.downsample_factor

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, JSON-able."""
        return asdict(self)

    def to_yaml(self) -> str:
        """Every key, resolved; `load_config` reads it back to an equal Config."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def window_overlap(wanted: Any) -> int:
    """Frames that a window shares with the next: `overlap`, or a quarter of `window`."""
    return wanted.overlap or max(1, wanted.window // 4)


def check_frame_keys(wanted: Any, prefix: str) -> None:
    """Check the keys for given frames and windows, which `sample` and the sampling of text have alike.

    Raises:
        ValueError: one sentence naming the key, with `prefix`.
    """
    require(wanted.given_frames >= 1, f"{prefix}given_frames must be at least 1, not {wanted.given_frames}.")
    require(
        not (wanted.first_frame and wanted.given),
        f"{prefix}first_frame and {prefix}given both say how the videos begin: set one of them.",
    )
    defaults = {item.name: item.default for item in fields(wanted)}
    for key, owner in {"given_frames": "given", "overlap": "window", "window_method": "window"}.items():
        value = getattr(wanted, key)
        require(
            bool(getattr(wanted, owner)) or value == defaults[key],
            f"{prefix}{key}={value} is read only with {prefix}{owner}: set that too.",
        )
    window, overlap = wanted.window, wanted.overlap
    require(window is None or window >= 2, f"{prefix}window must be at least 2, not {window}.")
    require(
        overlap is None or 1 <= overlap < window,
        f"{prefix}overlap must be from 1 to {prefix}window - 1 = {(window or 2) - 1}, not {overlap}.",
    )


def load_config(
    path: str | Path | None = None,
    overrides: list[str] | None = None,
    base: dict[str, Any] | None = None,
    *,
    saved: bool = False,
) -> Config:
    """Defaults, then the nested values `base`, then the YAML at `path`, then `key=value` overrides, checked.

    Args:
        saved: the YAML or `base` was written by a run, perhaps of an older version: keys removed since are left out.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file or key and what to do.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers: list[tuple[str, Any]] = [("the base configuration", base or {})]
    if path is not None:
        layers.append((str(path), read_yaml(Path(path))))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        require(bool(equals and key.strip()), f"{override!r} is not an override: write section.key=value.")
        try:
            _check_yaml(value, f"the value of {key}")
            layers.append(("the command line", OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ValueError(f"{override!r} cannot be read as section.key=value: {_one_line(error)}") from None
    merged = OmegaConf.structured(Config)
    for source, values in layers:
        require(isinstance(values, dict), f"{source} must hold sections like `model:` and `data:`.")
        values = drop_removed(values, source, saved=saved)
        _check_keys(values, Config, source)
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "a key"
            raise ValueError(f"{source}: {key}: {_one_line(error)}") from None
        except TypeError:  # OmegaConf's own, for a mapping where a list belongs
            raise ValueError(f"{source}: a value is of the wrong kind (a mapping where a list belongs?).") from None
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from None


def read_yaml(path: Path) -> Any:
    """The values of a YAML file, for `load_config` and for converting official files: plain and unresolved.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    import io

    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe" if path.exists() else "does not exist"
        raise FileNotFoundError(f"config file {path} {what}: name a YAML file; the shipped ones are under configs/.")
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MAX_YAML_CHARACTERS + 1)
        _check_yaml(text, f"config file {path}")
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {_one_line(error)}") from None


def _check_yaml(text: str, source: str) -> None:
    """Refuse YAML that only an attack or an accident writes, before anything is built from it.

    The parser's events are walked, which neither nest nor expand: building deep nesting recurses until the
    process dies, and aliases of aliases grow without bound.
    """
    import yaml

    require(len(text) <= MAX_YAML_CHARACTERS, f"{source} is too long for a config ({MAX_YAML_CHARACTERS} characters).")
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        require(number < MAX_YAML_EVENTS, f"{source} holds too many values for a config.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        require(depth <= MAX_YAML_DEPTH, f"{source} nests more than {MAX_YAML_DEPTH} levels deep; sections have keys.")
        require(not isinstance(event, yaml.AliasEvent), f"{source} uses a YAML alias (*name): write the value itself.")
        tag = getattr(event, "tag", None)
        require(tag is None, f"{source} uses a YAML tag ({tag}): write the plain value.")
        plain = isinstance(event, yaml.ScalarEvent) and event.implicit[0] and ODD_NUMBER.fullmatch(event.value)
        line = f", line {event.start_mark.line + 1}" if "\n" in text else ""
        require(
            not plain,
            f"{source}{line}: YAML reads {getattr(event, 'value', '')} in base 8 or 60: write "
            "a decimal number without a leading 0, or a word in quotes.",
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _check_keys(values: Mapping[str, Any], owner: type, source: str, prefix: str = "") -> None:
    """Refuse keys that `owner` lacks, with the new name of an official one or the nearest of ours."""
    known = {item.name: item for item in fields(owner)}
    hints = typing.get_type_hints(owner)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{source}: unknown key {name!r}.{_hint(str(key), name)}")
        if is_dataclass(hints[key]):
            require(isinstance(value, Mapping), f"{source}: {name} is a section and needs keys, not {value!r}.")
            _check_keys(value, typing.cast(type, hints[key]), source, f"{name}.")
        require(
            not (isinstance(value, bool) and hints[key] in (str, str | None)),
            f"{source}: {name} takes a word, and {str(value).lower()!r} is none: YAML reads yes, no, on and off as "
            "true and false; put it in quotes.",
        )
        require("${" not in str(value), f"{source}: {name}={value!r}: interpolation is not supported; write the value.")
        require(
            not (type(value) is int and value not in (0, 1) and hints[key] in (bool, bool | None)),
            f"{source}: {name} must be true or false, not {value}.",
        )
        require(value != "???", f"{source}: {name}=???: a value that is to be filled in later; write it.")


def _hint(key: str, name: str) -> str:
    if key in RENAMED:
        return f" It is called {RENAMED[key]} here (`python -m tools.convert config` translates a whole official file)."
    if key in DROPPED:
        return f" It has no counterpart: {DROPPED[key]}"
    known = list(all_keys())
    leaves = {full.rpartition(".")[2]: full for full in known}
    near = difflib.get_close_matches(name, known, 1, 0.7) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key, list(leaves), 1, 0.75)
    ]
    return f" Did you mean {near[0]!r}?" if near else " `python train.py --dry-run` prints all keys."


def all_keys(owner: type = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the configuration."""
    hints = typing.get_type_hints(owner)
    for item in fields(owner):
        if is_dataclass(hints[item.name]):
            yield from all_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"
