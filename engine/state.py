"""The training state: everything that changes from step to step, to and from checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusion import TimestepSampler, build_timestep_sampler
from models.convert import load_weights
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import lora_weights

from .alignment import Projector
from .build import PRECISIONS, build_model, put_adapters
from .checkpoint import Checkpoint
from .config import Config
from .distributed import World, gather_objects, gather_shards, shard, shards_like
from .guard import StepGuard
from .optim import EMA, build_optimizer
from .weights import load_base

MOMENTS = {False: ("exp_avg", "exp_avg_sq", "step"), True: ("momentum_buffer",)}  # of AdamW's group, of Muon's


@dataclass
class TrainState:
    """Network, EMA, optimizer, timestep sampler, guard and counters.

    Attributes:
        lora_base: SHA-256 of the base weights of a LoRA run; None: the whole network is trained.
        extra: modules that are trained too, but only for the loss: EMA and exports lack them.
        step: optimizer steps.
        samples_seen: clips, including those of skipped steps.
    """

    model: Latte | LatteT2V
    ema: EMA
    optimizer: torch.optim.Optimizer
    timestep_sampler: TimestepSampler
    guard: StepGuard
    lora_base: str | None = None
    extra: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    step: int = 0
    samples_seen: int = 0

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the network's parameters by name, then those of `extra`."""
        return chain(self.model.named_parameters(), self.extra.named_parameters())

    def trained_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the weights that a checkpoint holds: all, or only the adapters."""
        return model.state_dict() if self.lora_base is None else lora_weights(model.state_dict())

    def state_dict(self, facts: dict[str, Any], *, copy: bool = False) -> Checkpoint:
        """Returns everything needed to resume, on the CPU, independent of the number of ranks. Collective.

        `facts`: `Run.facts`; `copy`: copies CPU tensors too, so that training may change them.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        moments = self.optimizer.state
        optim = {f"{key}/{names[id(each)]}": value for each in moments for key, value in moments[each].items()}
        optim |= {f"weight/{name}": value for name, value in self.extra.state_dict().items()}
        rng = {f"cpu/{rank}": state for rank, state in enumerate(gather_objects(torch.get_rng_state()))}
        history = self.timestep_sampler.state_dict()
        rng |= {f"timestep_sampler/{key}": value.cpu() for key, value in history.items()}
        base = {"lora_base": self.lora_base} if self.lora_base else {}
        return Checkpoint(
            step=self.step,
            samples_seen=self.samples_seen,
            model=gather_shards(self.trained_weights(self.model), copy=copy),
            ema=gather_shards(self.trained_weights(self.ema.model), copy=copy),
            optim=gather_shards(optim, copy=copy),  # with AdamW's step counts and the weights of `extra`
            rng=rng,
            state={"ema_updates": self.ema.updates, "guard": self.guard.state_dict(), **facts, **base},
        )

    def load_state_dict(self, saved: Checkpoint, rank: int = 0) -> None:
        """Restores `saved` exactly. Raises: KeyError for a missing entry, ValueError for wrong weights."""
        load_trained(self.model, saved.model, "the checkpoint's model")
        load_trained(self.ema.model, saved.ema, "the checkpoint's EMA")
        self.ema.updates = saved.state["ema_updates"]
        self.extra.load_state_dict({name: saved.optim[f"weight/{name}"] for name in self.extra.state_dict()})
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        trained = [(each, group) for group in self.optimizer.param_groups for each in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for index, (parameter, group) in enumerate(trained if saved.step else ()):
            kinds, name = MOMENTS["momentum" in group], names[id(parameter)]
            moments = {key: saved.optim[f"{key}/{name}"] for key in kinds}
            steps = {"step": moments.pop("step")} if "step" in moments else {}
            state[index] = shards_like(moments, dict.fromkeys(moments, parameter)) | steps
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        history = {key: value for key, value in saved.rng.items() if key.startswith("timestep_sampler/")}
        self.timestep_sampler.load_state_dict({key.partition("/")[2]: value for key, value in history.items()})
        if f"cpu/{rank}" in saved.rng:
            torch.set_rng_state(saved.rng[f"cpu/{rank}"])
        self.guard.load_state_dict(saved.state["guard"])
        self.step, self.samples_seen = saved.step, saved.samples_seen


def load_trained(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Loads a checkpoint's weights, all or only adapters, into a network that may be sharded."""
    own = model.state_dict()
    adapters = lora_weights(own)
    if adapters:  # the base weights are already loaded
        weights = {key: own[key] for key in own.keys() - adapters.keys()} | weights
    load_weights(cast(Latte, model), shards_like(weights, own), source)


def build_state(config: Config, world: World, features_width: int = 0) -> TrainState:
    """Returns the initial state, drawn with `train.seed`: the same on every rank.

    `features_width`: of objective.features, if there are any.
    """
    precision = PRECISIONS[config.train.precision]
    torch.manual_seed(config.train.seed)
    model = build_model(config)
    lora_base = load_base(model, config) if config.lora.rank else None
    model.to(world.device, precision.dtype)
    if config.lora.rank:
        put_adapters(model, config)
    ema = EMA(model, config.train.ema_decay, config.train.ema_warmup)
    if config.train.parallel == "fsdp" and world.size > 1:
        shard(model, world, precision.autocast)
        shard(ema.model, world)
    extra = nn.ModuleDict({"projector": Projector(config, features_width)} if features_width else {})
    optimizer = build_optimizer(model, config.optim, extra.to(world.device, precision.dtype).parameters())
    sampler = build_timestep_sampler(config.diffusion)
    return TrainState(model, ema, optimizer, sampler, StepGuard(config.optim), lora_base, extra)
