"""Estimates the memory and time of a training run, and finds changes that make it fit.

    python -m tools.plan --config configs/ffs/ffs_train.yaml --gpu a100-80 --gpus 8 [--mfu 0.4] [section.key=value ...]
    python -m tools.plan --config configs/ffs/ffs_sample.yaml --sample                  memory of sampling

Memory is counted: parameters on the meta device, and the tensors that autograd saves when the network's forward runs on
tensors without data. Time is calculated: three forwards per step at a given share of the GPU's peak (MFU), the
optimiser's traffic at the GPU's memory bandwidth, and the part of the gradient exchange that the backward pass cannot
hide. docs/planning.md states the accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.checks import require
from engine import cli
from engine.build import build_model, count_parameters, forward_inputs, macs_per_clip, put_adapters
from engine.config import Config, ObjectiveConfig, OptimConfig, SampleConfig, TrainConfig, load_config
from engine.memory import FROZEN_BYTES, STATE_BYTES
from tools.plan_sampling import plan_sampling

GIB = 2**30
RESERVE = 0.08  # share of the memory for CUDA context, workspaces, fragmentation
UPDATE_BYTES = 28 + 12 + 4  # read and written per parameter: AdamW, EMA, norm
VAE_ENCODE_FLOP = 0.273e12 / 256**2  # per pixel, in Stable Diffusion's autoencoder
KEPT_WHEN_COMPILED = (
    "mm", "addmm", "bmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
BACKWARD_SHARE = 2 / 3  # share of a step's arithmetic that can hide the gradient exchange
PER_NODE = 8
LARGEST_BATCH = 128
LEAST_STEP_S = 0.02  # in shorter steps the GPU waits for the CPU


class Gpu(NamedTuple):
    """A GPU's data sheet: dense TFLOP/s by precision, memory in GB, bandwidths in GB/s.

    `link`: from one GPU to the others of its node, one way. `network`: its share of the node's to other nodes.
    """

    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float = 50.0  # 400 Gbit/s per GPU


# fmt: off
GPUS = {  #            bf16   tf32  fp32 memory bandwidth link network
    "h200":       Gpu(989.0, 494.0, 67.0, 141.0, 4800.0, 450.0),
    "h100":       Gpu(989.0, 494.0, 67.0,  80.0, 3350.0, 450.0),
    "a100-80":    Gpu(312.0, 156.0, 19.5,  80.0, 2039.0, 300.0, 25.0),
    "a100-40":    Gpu(312.0, 156.0, 19.5,  40.0, 1555.0, 300.0, 25.0),
    "l40s":       Gpu(362.0, 183.0, 91.6,  48.0,  864.0,  32.0, 25.0),
    "rtx4090":    Gpu(165.2,  82.6, 82.6,  24.0, 1008.0,  32.0, 3.0),
    "rtx3090":    Gpu( 71.0,  35.6, 35.6,  24.0,  936.0,  32.0, 3.0),
}
# fmt: on


class Network(NamedTuple):
    """Parameter counts of a config's network, FLOP of one clip's forward pass, bytes saved for its backward pass."""

    trained: int
    frozen: int
    forward_flop: float
    kept: tuple[float, float]
    kept_by_layer: float  # per clip, without checkpointing


def count_network(config: Config) -> Network:
    """Counts a config's network, once for all configs that differ only in batch, schedule or names."""
    train = config.train
    kept = TrainConfig(precision=train.precision, init_from=train.init_from, compile=train.compile)
    return _count_network(
        replace(config, train=kept, objective=ObjectiveConfig(), optim=OptimConfig(), sample=SampleConfig())
    )


@lru_cache
def _count_network(config: Config) -> Network:
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    model, data = _build_on_meta(config), config.data
    trained = count_parameters(model)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    flop = 2 * macs_per_clip(config) * (data.num_frames + data.num_images) / data.num_frames
    kept_by_layer = kept_for_backward(plain)[1] / config.model.size.depth
    return Network(trained, frozen, flop, kept_for_backward(config), kept_by_layer)


def _build_on_meta(config: Config) -> Any:
    model = build_model(config, "meta")
    return put_adapters(model, config) if config.lora.rank else model


def kept_for_backward(config: Config) -> tuple[float, float]:
    """Returns the bytes saved by a forward pass, (fixed, per clip), by running it on tensors without data.

    With checkpointing these are the blocks' inputs; if compiled, also the matrix products and attention of each block.
    """
    two, three = (_kept_of_batch(config, batch) for batch in (2, 3))  # for a single clip some copies would be views
    return 3 * two - 2 * three, three - two


def _kept_of_batch(config: Config, batch: int) -> float:
    kept: dict[int, Any] = {}  # each storage once, kept alive so that no address is reused
    model = _build_on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        own = {value.untyped_storage()._cdata for value in (*model.parameters(), *model.buffers())}

        def pack(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return value

        if config.train.compile and not config.model.gradient_checkpointing:
            for block in model.blocks:
                block.forward = _as_compiled(block.forward, pack)
        half = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), half:
            model(**forward_inputs(config, batch, "cpu"))
        return float(sum(storage.nbytes() for storage in kept.values()))


def _as_compiled(forward: Callable[..., Any], pack: Callable[[Any], Any]) -> Callable[..., Any]:
    """Returns `forward` that calls `pack` on what a compiled block saves: inputs, matrix products, attention."""

    def pack_tensors(values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                pack(value)

    class PackProducts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in KEPT_WHEN_COMPILED:
                pack_tensors(found)
            return found

    def run(*args: Any, **kwargs: Any) -> Any:
        pack_tensors((args, kwargs))
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value), PackProducts():
            return forward(*args, **kwargs)

    return run


class Need(NamedTuple):
    """Cost of one step of a config on one GPU: bytes, seconds, FLOP."""

    parameters: int
    states: dict[str, float]
    activations: float
    capacity: float
    flop: float
    encoding_flop: float
    compute_s: float
    encoding_s: float
    update_s: float
    exchange_s: float
    memory: float
    fits: bool
    step_s: float


def estimate_need(config: Config, gpu: Gpu, gpus: int, mfu: float) -> Need:
    """Returns the cost of a step of `config` on each of `gpus` GPUs."""
    train, data, checkpointing = config.train, config.data, config.model.gradient_checkpointing
    network = count_network(config)
    sharded = train.parallel == "fsdp" and gpus > 1
    share = network.trained / (gpus if sharded else 1)
    states = {name: size * share for name, size in STATE_BYTES.items()}
    if train.precision == "bf16":
        states["bf16 copy"] = 2 * network.trained
    if network.frozen:
        states["frozen weights"] = FROZEN_BYTES.get(train.precision, 4) * network.frozen
    fixed, per_clip = network.kept
    if checkpointing:
        per_clip += network.kept_by_layer  # the layer that is recomputed
    activations = max(0.0, fixed - states.get("bf16 copy", 0)) + per_clip * train.batch_size
    memory, capacity = sum(states.values()) + activations, gpu.memory * 1e9

    clips = train.batch_size * train.grad_accum_steps
    passes = 2 if network.frozen else 3  # gradients of frozen weights are not computed
    flop = passes * network.forward_flop * clips
    encoding = VAE_ENCODE_FLOP * data.image_size**2 * (data.num_frames + data.num_images) * clips
    encoding *= config.codec.path is not None and not data.latents
    rate = 1e12 * mfu * getattr(gpu, train.precision if train.precision in ("bf16", "tf32") else "fp32")
    compute = flop * (passes + checkpointing) / passes / rate
    update = UPDATE_BYTES * share / (gpu.bandwidth * 1e9)
    exchange = exchange_seconds(network.trained, gpu, gpus, sharded=sharded, accumulation=train.grad_accum_steps)
    seconds = compute, encoding / rate, update, max(0.0, exchange - BACKWARD_SHARE * compute)
    fits = memory <= capacity * (1 - RESERVE)
    costs = activations, capacity, flop, encoding, *seconds, memory, fits, sum(seconds)
    return Need(network.trained, states, *costs)


def exchange_seconds(parameters: int, gpu: Gpu, gpus: int, *, sharded: bool, accumulation: int) -> float:
    """Returns the seconds of a ring exchange over all GPUs, limited by its slowest link.

    DDP sends each fp32 gradient around twice per step. FSDP sends it once, and gathers the bf16 weights for the forward
    and for the backward of every micro-step.
    """
    speed = gpu.link if gpus <= PER_NODE else gpu.network
    sent = parameters * (4 * 1 + 2 * 2 * accumulation if sharded else 4 * 2)
    return sent * (gpus - 1) / gpus / (speed * 1e9)


def list_changes(config: Config, gpus: int) -> Iterator[list[str]]:
    """Yields overrides that save memory at an unchanged global batch size, cheapest first."""
    train = config.train
    first = [] if train.precision == "bf16" else ["train.precision=bf16"]
    sharding = [[], ["train.parallel=fsdp"]] if gpus > 1 and train.parallel != "fsdp" else [[]]
    checkpointing = [[]] if config.model.gradient_checkpointing else [[], ["model.gradient_checkpointing=true"]]
    halvings = (train.batch_size & -train.batch_size).bit_length()  # 1 + the number of factors of 2
    splits = [
        [f"train.batch_size={train.batch_size >> n}", f"train.grad_accum_steps={train.grad_accum_steps << n}"]
        for n in range(1, halvings)
    ]
    for shard, recompute, split in product(sharding, checkpointing, [[], *splits]):
        yield [*first, *split, *recompute, *shard]


def find_change(config: Config, gpu: Gpu, gpus: int, mfu: float) -> tuple[list[str], Need] | None:
    """Returns the first change that fits within 1.05 times the fastest fitting one's time; None if none fits."""
    base = config.to_dict()
    changes = list(list_changes(config, gpus))
    needs = [estimate_need(load_config(None, change, base=base), gpu, gpus, mfu) for change in changes]
    fastest = min((need.step_s for need in needs if need.fits), default=0.0)
    good = (each for each in zip(changes, needs) if each[1].fits and each[1].step_s <= 1.05 * fastest)
    return next(good, None)


def find_largest_batch(config: Config, gpu: Gpu, gpus: int, mfu: float) -> int:
    """Returns the largest train.batch_size that fits, or 0."""
    sizes = (load_config(None, [f"train.batch_size={size}"], base=config.to_dict()) for size in (1, 2))
    one, two = (estimate_need(each, gpu, gpus, mfu) for each in sizes)
    per_clip = two.memory - one.memory
    return max(0, min(LARGEST_BATCH, int((one.capacity * (1 - RESERVE) - (one.memory - per_clip)) // per_clip)))


def make_report(config: Config, name: str, gpus: int, mfu: float) -> dict[str, Any]:
    """Returns all figures, as JSON values."""
    train, machine = config.train, (GPUS[name], gpus, mfu)
    need = estimate_need(config, *machine)
    clips = train.batch_size * train.grad_accum_steps * gpus
    change = None if need.fits and train.precision == "bf16" else find_change(config, *machine)
    return {
        "gpu": name,
        "gpus": gpus,
        "mfu": mfu,
        "needs": need._asdict(),
        "largest_batch_size": find_largest_batch(config, *machine),
        "videos_per_second": clips / need.step_s,
        "hours": need.step_s * train.max_steps / 3600,
        "max_steps": train.max_steps,
        "global_batch_size": clips,
        "change": change and {"overrides": change[0], "memory": change[1].memory, "step_s": change[1].step_s},
    }


TIMES = {
    "compute_s": "forward and backward",
    "encoding_s": "encoding the videos (SD's autoencoder)",
    "update_s": "optimiser and EMA",
    "exchange_s": "exchange not hidden by backward",
    "step_s": "total",
}


def format_duration(found: dict[str, Any]) -> str:
    """Returns the speed and the duration of the run; for tiny steps, why they are not known."""
    if found["needs"]["step_s"] < LEAST_STEP_S:
        longer = f"{found['max_steps']:,} steps take longer than {found['hours'] * 60:,.1f} minutes"
        return f"steps this short wait for data and kernel launches, which are not estimated:\n{longer}; measure a few"
    speed = f"{found['videos_per_second']:.1f} clips per second in batches of {found['global_batch_size']}"
    hours = f"{found['hours']:,.0f}" if found["hours"] >= 10 else f"{found['hours']:.1f}"
    return f"{speed}; {found['max_steps']:,} steps take {hours} hours"


def format_report(found: dict[str, Any], config: Config) -> str:
    """Returns the readable report, 80 columns wide."""
    need, change = found["needs"], found["change"]
    trained = "trained " if config.lora.rank else ""
    size = f"{need['parameters'] / 1e6:.1f} M {trained}parameters"
    parts = {**need["states"], "saved for the backward pass": need["activations"]}
    verdict = "fits" if need["fits"] else "DOES NOT FIT"
    lines = [
        f"{config.model.name}, {size}, on {found['gpus']} x {found['gpu']}",
        "",
        "memory per GPU                             GiB",
        *(f"  {part:36s}{size / GIB:8.2f}" for part, size in parts.items()),
        f"  {'total':36s}{need['memory'] / GIB:8.2f}  of {need['capacity'] / GIB:.1f}: {verdict}",
        f"  largest train.batch_size              {found['largest_batch_size']:6d}",
        "",
        f"time per step, at {found['mfu']:.0%} of the peak               ms",
        *(f"  {text:36s}{1000 * need[part]:8.1f}" for part, text in TIMES.items()),
        "",
        format_duration(found),
    ]
    if change:
        lines.append(f"better: {' '.join(change['overrides']) or 'unchanged'}")
        lines.append(f"  {change['memory'] / GIB:.1f} GiB, {1000 * change['step_s']:.0f} ms per step")
    elif not need["fits"]:
        lines.append("no change of these keys makes it fit: use a smaller model.name, fewer frames, or a larger GPU")
    if need["encoding_s"]:
        lines.append("tools.cache_latents encodes the videos once (data.latents=PATH)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Plans the run of the command line; returns the exit code."""
    parser = cli.config_parser(__doc__ or "", "%(prog)s --config FILE [--gpu NAME] [key=value ...]")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(GPUS)} (h100)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes, one per GPU (1)")
    parser.add_argument("--mfu", type=float, default=0.4, metavar="X", help="share of the peak FLOP/s reached (0.4)")
    parser.add_argument("--sample", action="store_true", help="plan sampling on one GPU, not training")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_intermixed_args(argv)
    require(given.gpu in GPUS, f"--gpu {given.gpu} is unknown; one of {', '.join(GPUS)}.")
    require(given.gpus >= 1 and 0 < given.mfu <= 1, "--gpus must be at least 1, and --mfu above 0 and at most 1.")
    config = load_config(given.config, given.overrides)
    if given.sample:
        found: dict[str, Any] = plan_sampling(config)
        text = "\n".join(f"{part:40s}{size / GIB:8.2f} GiB" for part, size in found.items())
    else:
        found = make_report(config, given.gpu, given.gpus, given.mfu)
        text = format_report(found, config)
    print(json.dumps(found, indent=2) if given.json else text)
    return 0


if __name__ == "__main__":
    cli.run(main)
