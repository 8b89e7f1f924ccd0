"""The sections `optim`, `train`, `sample` and `monitor`, with the limits of their keys.

The other sections are defined where they are read, in models/, diffusion/ and datasets/.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from common.checks import (
    FINITE,
    FOLDER,
    NOT_NEGATIVE,
    POSITIVE,
    Limit,
    at_least,
    check_limits,
    check_read_only_with,
    one_of,
    optional,
    require,
    within,
)
from datasets.config import MAX_TIMEOUT_S
from diffusion import GaussianDiffusion, RectifiedFlow
from diffusion.samplers import list_methods
from models import attention

SEED = Limit("zero or more and below 2**63", lambda value: 0 <= value < 2**63)  # the range of torch.Generator
YEAR = f"at most {MAX_TIMEOUT_S:.0f} (a year)"

# ---- optim -----------------------------------------------------------------------------------------

OPTIM_LIMITS = {
    "learning_rate eps max_grad_norm": POSITIVE,
    "weight_decay warmup_steps min_learning_rate clip_start_step": NOT_NEGATIVE,
    "beta1 beta2": within(0, 1, "[)"),
    "spike_factor": Limit("above 1 and finite, or 0 for none", lambda value: value == 0 or 1 < value < math.inf),
    "max_skips": at_least(1),
    "name": one_of(("adamw", "muon")),
    "schedule": one_of(("constant", "cosine")),
    "spike_policy": one_of(("skip", "clip")),
}


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section. Defaults are the official recipe."""

    name: str = "adamw"  # adamw | muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "constant"  # constant | cosine (to min_learning_rate at train.max_steps)
    warmup_steps: int = 0  # linear from learning_rate / warmup_steps, with either schedule
    min_learning_rate: float = 0.0  # final value of schedule=cosine
    max_grad_norm: float = 0.1  # of the whole gradient, after accumulation
    clip_start_step: int = 20_000  # before it, the norm is only measured
    spike_factor: float = 0.0  # a norm above this x the running median is a spike; 0: off
    spike_policy: str = "skip"  # skip | clip (to the median)
    max_skips: int = 20  # skipped steps in a row (spikes, non-finite) that end the run
    fused: bool | None = None  # fused AdamW kernel; null: on CUDA only

    def __post_init__(self) -> None:
        check_limits(self, "optim.", OPTIM_LIMITS)
        require(
            self.min_learning_rate <= (self.learning_rate if self.schedule == "cosine" else 0),
            f"optim.min_learning_rate={self.min_learning_rate} is the final value of optim.schedule=cosine: "
            "set that schedule, and a value up to optim.learning_rate.",
        )


# ---- objective -------------------------------------------------------------------------------------

TWO_BLOCKS = Limit("two ascending block indices", lambda value: len(value) == 2 and 0 <= value[0] < value[1])
OBJECTIVE_LIMITS = {
    "route_blocks sync_blocks": optional(TWO_BLOCKS),
    "route_keep": within(0, 1, "()"),
    "sync_weight features_weight": POSITIVE,
    "features_block features_until": at_least(0),
    "features_method": one_of(("repa", "irepa")),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The `objective` section: optional changes to the training loss; docs/levers.md describes them."""

    route_blocks: list[int] | None = None  # [start, stop]: some tokens skip start to stop - 1 (TREAD)
    route_keep: float = 0.5  # share of the tokens that these blocks compute
    sync_blocks: list[int] | None = None  # [early, late]: aligns early's tokens with late's (LayerSync)
    sync_weight: float = 0.2  # weight of that term
    features: str | None = None  # aligns tokens with the image features in this cache of tools.cache_features
    features_block: int = 0  # the block whose tokens are aligned
    features_method: str = "repa"  # repa | irepa: docs/levers.md
    features_weight: float = 0.5  # weight of that term
    features_until: int = 0  # step at which that term ends; 0: never

    def __post_init__(self) -> None:
        check_limits(self, "objective.", OBJECTIVE_LIMITS)
        owners = {"route_keep": "route_blocks", "sync_weight": "sync_blocks"}
        owners |= {"features_block features_method features_weight features_until": "features"}
        check_read_only_with(self, "objective.", owners)

    @property
    def routed(self) -> range:
        """The blocks that some tokens skip."""
        return range(*self.route_blocks or (0,))

    @property
    def synced(self) -> tuple[int, ...]:
        """The earlier and the later block to align, or none."""
        return tuple(self.sync_blocks or ())


# ---- train -----------------------------------------------------------------------------------------

TRAIN_LIMITS = {
    "output_dir": FOLDER,
    "max_steps batch_size grad_accum_steps log_every checkpoint_every": at_least(1),
    "keep_last keep_every temporal_ramp_steps drift_check_every": at_least(0),
    "ema_decay": within(0, 1, "[)"),
    "seed": SEED,
    "timeout_s": Limit(f"above 0 and {YEAR}", lambda value: 0 < value <= MAX_TIMEOUT_S),
    "hang_timeout_s": Limit(f"zero or more and {YEAR}", lambda value: 0 <= value <= MAX_TIMEOUT_S),
    "precision": one_of(("fp32", "tf32", "bf16", "fp64")),
    "attention": one_of(attention.CHOICES),
    "parallel": one_of(("ddp", "fsdp")),
}


@dataclass(frozen=True)
class TrainConfig:
    """The `train` section. Steps are optimizer steps; batch_size is per process and micro-step."""

    output_dir: str = "results/run"  # receives config.yaml, metrics.jsonl, checkpoints/
    max_steps: int = 1_000_000
    batch_size: int = 5
    grad_accum_steps: int = 1
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # a lower decay in the first steps
    log_every: int = 100
    checkpoint_every: int = 10_000  # and always at max_steps
    keep_last: int = 2  # newest checkpoints kept; 0 keeps all
    keep_every: int = 0  # also keeps those at multiples of this step; 0: off
    async_checkpoint: bool = False  # write them in a background thread while training continues
    resume: str = "auto"  # auto: newest checkpoint in output_dir | never | a checkpoint to use if output_dir has none
    init_from: str | None = None  # weights only: our checkpoint, an official .pt, or an image DiT's
    # steps over which temporal positions fade in, for a text network that starts from an image network
    temporal_ramp_steps: int = 0
    seed: int = 0
    precision: str = "fp32"  # fp32 | tf32 | bf16 (autocast over fp32 weights) | fp64 (for exact comparisons)
    compile: bool = False  # torch.compile each block in place
    run_ahead: bool = True  # queue the next step before reading a step's results; false: wait for each
    attention: str = "auto"  # auto | fused | plain (the reference): docs/attention.md
    parallel: str = "ddp"  # ddp | fsdp (weights, gradients, moments and EMA sharded over the ranks)
    drift_check_every: int = 1000  # steps between bitwise comparisons of the ranks' weights; 0: never
    timeout_s: float = 1800.0  # a collective that takes longer ends the run; at least 600 until the first step
    hang_timeout_s: float = 900.0  # if a step takes longer, stacks are written to errors/; 0: never

    def __post_init__(self) -> None:
        check_limits(self, "train.", TRAIN_LIMITS)


# ---- sample ----------------------------------------------------------------------------------------

GAUSSIAN_METHODS = ("auto", *list_methods(GaussianDiffusion))
FLOW_METHODS = ("auto", *list_methods(RectifiedFlow))
SAMPLE_PRECISIONS = ("fp32", "bf16", "fp16")
LABEL_RULES = ("balanced", "random")


FRAME_LIMITS = {"given_frames": at_least(1), "window": optional(at_least(2))}  # shared by `sample` and configs/t2x
SAMPLE_LIMITS = {
    "num_videos steps batch_size fps": at_least(1),
    "save_video_path": FOLDER,
    "label_rule": one_of(LABEL_RULES),
    "seed": SEED,
    "method": one_of(dict.fromkeys((*GAUSSIAN_METHODS, *FLOW_METHODS))),
    "eta": within(0, 1),
    "guidance_scale": NOT_NEGATIVE,
    "guidance_interval": optional(
        Limit(
            "two numbers, 0 (data) <= first <= second <= 1 (noise)",
            lambda value: len(value) == 2 and 0 <= value[0] <= value[1] <= 1,
        )
    ),
    "weights": one_of(("ema", "raw")),
    "lora_scale": FINITE,
    "precision": one_of(SAMPLE_PRECISIONS),
    "window_method": one_of(("auto", "rolling", "autoregressive", "fused")),
    **FRAME_LIMITS,
}
SAMPLE_OWNERS = {"eta": "method=ddim", "guidance_interval": "guidance_scale", "lora_scale": "lora"}


@dataclass(frozen=True)
class SampleConfig:
    """The `sample` section: settings of sample/sample.py, which its flags override."""

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
    guidance_interval: list[float] | None = None  # guide only at noise levels in [first, second], 0 to 1
    batched_guidance: bool = True  # conditional and unconditional in one call; false: one by one, half the memory
    weights: str = "ema"  # ema | raw
    lora: str | None = None  # adapters to merge into the network: a folder in peft's format
    lora_scale: float = 1.0  # factor of the merged adapters
    precision: str = "fp32"  # fp32 | bf16 | fp16
    cast_weights: bool = False  # also cast the weights to `precision`: half the memory
    compile: bool = False  # torch.compile the network; on CUDA with CUDA graphs
    overlap_decode: bool = True  # on CUDA, decode a batch while the next is being sampled
    batch_size: int = 4
    fps: int = 8
    first_frame: list[str] | None = None  # images that videos start with, assigned in turn by index
    last_frame: list[str] | None = None  # images that videos end with, in turn
    given: list[str] | None = None  # videos to continue, in turn
    given_frames: int = 1  # number of last frames of `given` to continue from
    window: int | None = None  # videos of more frames are sampled in windows of this length; null: all frames at once
    overlap: int | None = None  # frames shared by successive windows; null: a quarter of the window
    # rolling (networks trained with a timestep per frame) | autoregressive (with given frames) | fused; auto: the first
    # that the network supports
    window_method: str = "auto"

    def __post_init__(self) -> None:
        check_limits(self, "sample.", SAMPLE_LIMITS)
        require(
            not (self.cast_weights and self.precision == "fp32"),
            "sample.cast_weights=true stores the weights in sample.precision: set sample.precision to bf16 or fp16.",
        )
        check_read_only_with(self, "sample.", SAMPLE_OWNERS)
        check_frame_keys(self, "sample.")


def window_overlap(wanted: Any) -> int:
    """Returns the frames that a window shares with the next: `overlap`, or a quarter of `window`."""
    return wanted.overlap or max(1, wanted.window // 4)


def check_frame_keys(wanted: Any, prefix: str) -> None:
    """Checks the keys for given frames and windows, shared by `sample` and configs/t2x."""
    require(
        not (wanted.first_frame and wanted.given),
        f"{prefix}first_frame and {prefix}given both say how the videos begin: set one of them.",
    )
    check_read_only_with(wanted, prefix, {"given_frames": "given", "overlap window_method": "window"})
    window, overlap = wanted.window, wanted.overlap
    require(
        overlap is None or 1 <= overlap < window,
        f"{prefix}overlap must be from 1 to {prefix}window - 1 = {(window or 2) - 1}, got {overlap}.",
    )


# ---- monitor ---------------------------------------------------------------------------------------

MONITOR_LIMITS = {
    "val_every sample_every metric_every": at_least(0),
    "val_clips sample_videos": at_least(1),
    "val_buckets": within(1, 100),
    "metric_videos": at_least(2),
}
MONITOR_OWNERS = {
    "val_clips val_buckets": "val_every",
    "sample_videos": "sample_every",
    "metric_videos metric_detector metric_detector_path metric_detector_sha256": "metric_every",
}


@dataclass(frozen=True)
class MonitorConfig:
    """The `monitor` section: callbacks at step 0, every n steps (0: never) and at the last step.

    They do not affect training, so every key may change when a run resumes.
    """

    val_every: int = 0  # loss on held-out clips (data.val_path or data.val_share)
    val_clips: int = 64  # maximum number of these clips
    val_buckets: int = 10  # equal parts of the timesteps; each clip is noised once in each
    sample_every: int = 0  # samples from EMA and raw weights, with the settings of `sample`
    sample_videos: int = 4  # number of samples from each
    metric_every: int = 0  # Frechet distance between samples from EMA weights and held-out clips
    metric_videos: int = 256  # number of samples, and maximum number of clips
    metric_detector: str | None = None  # its name: i3d, mobilenet_v2_clip, ... (docs/monitoring.md)
    metric_detector_path: str | None = None  # its file
    metric_detector_sha256: str | None = None  # required SHA-256 of the file; null: any (it is logged)

    def __post_init__(self) -> None:
        check_limits(self, "monitor.", MONITOR_LIMITS)
        check_read_only_with(self, "monitor.", MONITOR_OWNERS)
