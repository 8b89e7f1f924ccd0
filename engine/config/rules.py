"""The whole configuration, and a table of the combinations that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from common.checks import require
from datasets.config import DataConfig
from datasets.recipes import CAPTIONED
from diffusion import ConditionConfig, DiffusionConfig
from models.autoencoder import CodecConfig
from models.config_t2v import LATTE_1, LatteT2VConfig
from models.latte import LatteConfig
from models.lora import LoraConfig
from models.text_encoder import TextConfig

from .sections import (
    FLOW_METHODS,
    GAUSSIAN_METHODS,
    MonitorConfig,
    ObjectiveConfig,
    OptimConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Each section is defined by the package that reads it."""

    model: LatteConfig = field(default_factory=LatteConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        for sentence, is_broken in RULES.items():
            if is_broken(self):
                raise ValueError(sentence.format(c=self))
        self.condition.check_clip(self.data.num_frames, self.model.frames_per_token)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents, in latent pixels."""
        return self.data.image_size // self.codec.downsample_factor

    @property
    def token_grid(self) -> int:
        """Rows, and columns, of the network's tokens in a frame."""
        return self.latent_size // self.model.size.patch_size

    @property
    def pixels_per_token(self) -> int:
        """Height and width of a token, in pixels of the video."""
        return self.codec.downsample_factor * self.model.size.patch_size

    @property
    def last_block(self) -> int:
        """Index of the network's last block."""
        return self.model.size.depth - 1

    @property
    def is_flow(self) -> bool:
        """Whether the diffusion is a rectified flow."""
        return self.diffusion.prediction == "flow"

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes class labels or captions."""
        return self.model.num_classes > 0 or self.model.is_text

    @property
    def has_null(self) -> bool:
        """Whether the network was trained with its null label or the empty caption, which guidance needs."""
        dropout = self.text.caption_dropout if self.model.is_text else self.model.label_dropout
        return self.is_conditional and dropout > 0

    def text_network(self) -> LatteT2VConfig:
        """Returns the text network's config: Latte-1, or the same architecture in another size.

        Latte-1 keeps its original clip size, whatever it is trained on now: positions are computed.
        """
        size, channels, width = self.model.size, self.codec.latent_channels, self.text.caption_channels
        is_latte_1 = self.model.name == "Latte-1"
        require(
            not is_latte_1 or (channels, width) == (LATTE_1.in_channels, LATTE_1.caption_channels),
            f"model.name=Latte-1 takes {LATTE_1.in_channels} latent channels and captions {LATTE_1.caption_channels} "
            f"wide, not codec.latent_channels={channels} and text.caption_channels={width}.",
        )
        return replace(
            LATTE_1,
            num_attention_heads=size.num_heads,
            attention_head_dim=size.hidden_size // size.num_heads,
            cross_attention_dim=size.hidden_size,
            num_layers=size.depth // (1 if self.model.name == "custom-t2i" else 2),
            patch_size=size.patch_size,
            in_channels=channels,
            out_channels=channels * (2 if self.model.learn_sigma else 1),
            sample_size=LATTE_1.sample_size if is_latte_1 else self.latent_size,
            caption_channels=width,
            video_length=LATTE_1.video_length if is_latte_1 else self.data.num_frames,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain nested dict, JSON-able."""
        return asdict(self)

    def to_flat_dict(self) -> dict[str, Any]:
        """Returns the values by their dotted keys."""
        return {f"{name}.{key}": value for name, keys in self.to_dict().items() for key, value in keys.items()}

    def to_yaml(self) -> str:
        """Returns all keys as YAML, which `load_config` turns back into an equal Config."""
        from omegaconf import OmegaConf  # see `loading`

        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


# error message, formatted with the config as `c` -> whether to raise it
RULES: dict[str, Callable[[Config], object]] = {
    # sizes
    "data.image_size={c.data.image_size} must be a multiple of {c.pixels_per_token} "
    "(codec.downsample_factor x the patch size of model.name).": lambda c: c.data.image_size % c.pixels_per_token != 0,
    "data.num_frames={c.data.num_frames} must be a multiple of "
    "model.tubelet_size={c.model.frames_per_token}.": lambda c: c.data.num_frames % c.model.frames_per_token != 0,
    # diffusion
    "diffusion.prediction=flow has no variance to learn: set model.learn_sigma=false.": lambda c: (
        c.is_flow and c.model.learn_sigma
    ),
    "diffusion.fixed_variance is read only for networks without a learned variance: set model.learn_sigma=false, "
    "or leave it out.": lambda c: c.model.learn_sigma and c.diffusion.fixed_variance != "large",
    # sampling
    "sample.labels: this network is unconditional (model.num_classes is 0): leave labels out.": lambda c: (
        bool(c.sample.labels) and not c.is_conditional
    ),
    "sample.label_rule={c.sample.label_rule}: this network is unconditional (model.num_classes is 0): leave it "
    "out.": lambda c: c.sample.label_rule != "balanced" and not c.is_conditional,
    "sample.method={c.sample.method} does not belong to diffusion.prediction=flow: use "
    + ", ".join(FLOW_METHODS)
    + ".": lambda c: c.is_flow and c.sample.method not in FLOW_METHODS,
    "sample.method={c.sample.method} does not belong to diffusion.prediction={c.diffusion.prediction}: use "
    + ", ".join(GAUSSIAN_METHODS)
    + ".": lambda c: not c.is_flow and c.sample.method not in GAUSSIAN_METHODS,
    "sample.steps={c.sample.steps} is more than the {c.diffusion.num_steps} steps of the diffusion "
    "(diffusion.num_steps).": lambda c: not c.is_flow and c.sample.steps > c.diffusion.num_steps,
    "sample.guidance_scale={c.sample.guidance_scale} needs a class-conditional network with a null label: set "
    "model.num_classes and a model.label_dropout (of a text network, text.caption_dropout) above 0, or "
    "sample.guidance_scale=1.": lambda c: c.sample.guidance_scale != 1 and not c.has_null,
    # objective
    "objective.route_blocks={c.objective.route_blocks} must end at most at {c.model.size.depth}, the number of "
    "blocks.": lambda c: c.objective.routed.stop > c.model.size.depth,
    "objective.sync_blocks={c.objective.sync_blocks}: the network has only blocks 0 to {c.last_block}.": lambda c: (
        max(c.objective.synced, default=0) > c.last_block
    ),
    "objective.sync_blocks={c.objective.sync_blocks}: only one of the two lies inside "
    "objective.route_blocks={c.objective.route_blocks}, where some tokens are missing: choose both inside or both "
    "outside.": lambda c: len({block in c.objective.routed for block in c.objective.synced}) > 1,
    "objective.route_blocks is not built for text networks: leave it out.": lambda c: (
        c.model.is_text and bool(c.objective.routed)
    ),
    "objective.features_block={c.objective.features_block}: the network has only blocks 0 to {c.last_block}.": (
        lambda c: c.objective.features_block > c.last_block
    ),
    "objective.features_block={c.objective.features_block} lies inside "
    "objective.route_blocks={c.objective.route_blocks}, where some tokens are missing: choose a block outside.": (
        lambda c: bool(c.objective.features) and c.objective.features_block in c.objective.routed
    ),
    "objective.features trains a projector, which is not sharded: leave train.parallel at ddp.": lambda c: (
        bool(c.objective.features) and c.train.parallel == "fsdp"
    ),
    # text networks
    "data.name={c.data.name} has captions, which model.name={c.model.name} does not read: set "
    "model.name=custom-t2v or Latte-1, or data.name=folder.": lambda c: (
        not c.model.is_text and c.data.name == CAPTIONED
    ),
    **{
        f"text.{item.name} is read only by a text network: set model.name=Latte-1 or custom-t2v, "
        "or leave it out.": lambda c, item=item: not c.model.is_text and getattr(c.text, item.name) != item.default  # type: ignore[misc]
        for item in fields(TextConfig)
    },
    "train.temporal_ramp_steps is read only by a text network that starts from an image network: leave "
    "it out.": lambda c: not c.model.is_text and c.train.temporal_ramp_steps > 0,
    "model.name={c.model.name} is trained on captions: set data.name=captions, not {c.data.name}.": lambda c: (
        c.model.is_text and c.data.name != CAPTIONED
    ),
    "model.name=custom-t2i has no temporal layers: set data.num_frames=1, not {c.data.num_frames}.": lambda c: (
        c.model.name == "custom-t2i" and c.data.num_frames != 1
    ),
    "model.variant=image has no temporal layers: set data.num_frames=1, not {c.data.num_frames}.": lambda c: (
        c.model.variant == "image" and c.data.num_frames != 1
    ),
    "train.temporal_ramp_steps={c.train.temporal_ramp_steps} is for a network that starts from an image network: "
    "name that with train.init_from, or set it to 0.": lambda c: (
        c.train.temporal_ramp_steps > 0 and c.train.init_from is None
    ),
    "optim.name=muon needs whole matrices: leave train.parallel at ddp.": lambda c: (
        c.optim.name == "muon" and c.train.parallel == "fsdp"
    ),
    # adapters
    "lora.rank={c.lora.rank} trains adapters on given base weights: name these with train.init_from.": lambda c: (
        c.lora.rank > 0 and c.train.init_from is None
    ),
    "lora.rank={c.lora.rank} leaves little to shard: leave train.parallel at ddp.": lambda c: (
        c.lora.rank > 0 and c.train.parallel == "fsdp"
    ),
    "train.temporal_ramp_steps={c.train.temporal_ramp_steps} is for a network that starts from an image network, "
    "which must train its temporal layers in full: leave lora.rank out.": lambda c: (
        c.lora.rank > 0 and c.train.temporal_ramp_steps > 0
    ),
    # monitoring
    **{
        f"monitor.{key}={{c.monitor.{key}}} needs clips that are not trained on: set data.val_path to their "
        "folder, or data.val_share to a share of the clips of data.path.": lambda c, key=key: (
            getattr(c.monitor, key) > 0 and c.data.val_path is None and not c.data.val_share > 0
        )  # type: ignore[misc]
        for key in ("val_every", "metric_every")
    },
    "data.val_path is not in the cache of data.latents, where monitor.val_every reads: hold clips out of data.path "
    "with data.val_share instead.": lambda c: bool(c.monitor.val_every and c.data.latents and c.data.val_path),
    "data.val_path is read only with monitor.val_every or monitor.metric_every: set one of them.": lambda c: (
        c.data.val_path is not None and not (c.monitor.val_every or c.monitor.metric_every)
    ),
    "monitor.val_buckets={c.monitor.val_buckets} is more than diffusion.num_steps={c.diffusion.num_steps}: lower "
    "it.": lambda c: c.monitor.val_every > 0 and c.monitor.val_buckets > c.diffusion.num_steps,
    "monitor.metric_every={c.monitor.metric_every} needs a detector: set monitor.metric_detector to its name, and "
    "monitor.metric_detector_path to its file.": lambda c: (
        c.monitor.metric_every > 0 and not (c.monitor.metric_detector and c.monitor.metric_detector_path)
    ),
    **{
        f"monitor.{key}: train.precision=fp64 is for exact comparisons and cannot be sampled from: use fp32, tf32 "
        "or bf16.": lambda c, key=key: getattr(c.monitor, key) > 0 and c.train.precision == "fp64"  # type: ignore[misc]
        for key in ("sample_every", "metric_every")
    },
}
